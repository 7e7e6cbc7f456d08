#include "app/progress.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include <fmt/format.h>
#include <unistd.h>

#include "src/core/units.h"

namespace fathom::app {

Progress::Progress(std::string what) : what_(std::move(what)), terminal_(::isatty(STDERR_FILENO) == 1) {}

Progress::~Progress() {
  if (line_open_) std::fputs("\n", stderr);
}

bool Progress::due() const { return shown_.seconds() > (terminal_ ? 0.1 : 10.0); }

void Progress::update(std::int64_t done, std::int64_t total, const std::string& details) {
  if (!due()) return;
  shown_.restart();
  const double elapsed = start_.seconds();
  const double share =
      total > 0 ? std::clamp(static_cast<double>(done) / static_cast<double>(total), 0.0, 1.0) : 0.0;
  const double rate = static_cast<double>(done) / std::max(elapsed, 1e-9);
  std::string text = fmt::format("{} {:3.0f}%  {}  {}/s", what_, 100 * share, details, format_bytes(rate));
  if (share > 0.01) text += fmt::format("  {:.0f} s left", elapsed * (1 - share) / share);
  if (terminal_) {
    constexpr int kBar = 20;
    const int filled = static_cast<int>(share * kBar);
    fmt::print(stderr, "\r[{:#<{}}{:.<{}}] {}\x1b[K", "", filled, "", kBar - filled, text);
    std::fflush(stderr);
    line_open_ = true;
  } else {
    fmt::print(stderr, "{}\n", text);
  }
}

}  // namespace fathom::app
