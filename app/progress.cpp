#include "app/progress.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <utility>

#include <fmt/format.h>
#include <unistd.h>

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
  std::string text = fmt::format("{} {:3.0f}%  {}  {}/s", what_, 100 * share, details,
                                 bytes_text(static_cast<std::int64_t>(rate)));
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

std::string with_commas(std::int64_t value) {
  std::string digits = std::to_string(value);
  const std::size_t first = value < 0 ? 1 : 0;
  for (std::size_t at = digits.size(); at > first + 3;) digits.insert(at -= 3, ",");
  return digits;
}

std::string bytes_text(std::int64_t bytes) {
  constexpr std::array<const char*, 5> kUnits = {"B", "kB", "MB", "GB", "TB"};
  double value = static_cast<double>(bytes);
  std::size_t unit = 0;
  while (value >= 999.5 && unit + 1 < kUnits.size()) {
    value /= 1000;
    ++unit;
  }
  return unit == 0 ? fmt::format("{} B", bytes) : fmt::format("{:.1f} {}", value, kUnits[unit]);
}

}  // namespace fathom::app
