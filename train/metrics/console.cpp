#include "train/metrics/console.h"

#include <chrono>

#include <sys/ioctl.h>
#include <unistd.h>

namespace fathom {
namespace {

constexpr int kUnknownWidth = 100;
constexpr double kRepaintSeconds = 0.1;

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Console::Console(std::ostream& out, ConsoleOptions options) : out_(out), options_(std::move(options)) {
  if (!options_.width) options_.width = [] { return kUnknownWidth; };
  if (!options_.clock) options_.clock = steady_seconds;
}

void Console::step(const StepRecord& record) {
  const double now = options_.clock();
  const bool last = record.step >= options_.total_steps;
  const double elapsed = last_seconds_ ? now - *last_seconds_ : 1e300;
  if (options_.kind == ConsoleKind::Terminal) {
    if (elapsed < kRepaintSeconds && !last) return;
    // One column is left free: some terminals wrap when the last one is filled.
    out_ << '\r' << format_live_step(record, options_.total_steps, options_.width() - 1) << "\x1b[K"
         << std::flush;
    live_ = true;
  } else {
    const double share = options_.total_steps > 0 ? 1.0 * record.step / options_.total_steps : 0.0;
    const auto share_index = static_cast<std::int64_t>(share / options_.every_share + 1e-9);
    if (share_index == last_share_ && elapsed < options_.every_seconds && !last) return;
    last_share_ = share_index;
    out_ << format_step(record, options_.total_steps) << std::endl;
  }
  last_seconds_ = now;
}

void Console::evaluation(const EvalRecord& record) { message(format_evaluation(record)); }
void Console::event(const EventRecord& record) { message(format_event(record)); }

void Console::message(const std::string& text) {
  if (live_) out_ << "\r\x1b[K";
  live_ = false;
  out_ << text << std::endl;
}

void Console::finish() {
  if (live_) out_ << std::endl;
  live_ = false;
}

ConsoleKind console_kind(int fd) { return ::isatty(fd) == 1 ? ConsoleKind::Terminal : ConsoleKind::Pipe; }

int terminal_width(int fd) {
  winsize size{};
  return ::ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : kUnknownWidth;
}

}  // namespace fathom
