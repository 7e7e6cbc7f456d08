#include "app/progress.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include <fmt/format.h>
#include <unistd.h>

#include "src/core/units.h"

namespace fathom::app {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

}  // namespace

Progress::Progress(std::string what)
    : what_(std::move(what)), terminal_(::isatty(STDERR_FILENO) == 1), start_(Clock::now()), shown_(start_) {}

Progress::~Progress() {
  if (line_open_) std::fputs("\n", stderr);
}

bool Progress::due() const { return seconds_since(shown_) > (terminal_ ? 0.1 : 10.0); }

void Progress::update(std::int64_t done, std::int64_t total, const std::string& details) {
  if (!due()) return;
  shown_ = Clock::now();
  const double elapsed = seconds_since(start_);
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
