#include "train/signals.h"

#include <atomic>
#include <cstdint>
#include <iterator>

#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "kernels/error.h"

namespace fathom {
namespace {

// timeout(1) signals the process and then its group: two signals for one wish. So a repeat within this time
// is no second request.
constexpr std::int64_t kSameRequestNs = 100'000'000;

std::atomic<int> first_signal{0};
std::atomic<std::int64_t> first_time_ns{0};
bool installed = false;
constexpr int kSignals[] = {SIGTERM, SIGINT, SIGHUP};
struct sigaction previous[std::size(kSignals)];

static_assert(std::atomic<int>::is_always_lock_free && std::atomic<std::int64_t>::is_always_lock_free,
              "a signal handler may not take a lock");

std::int64_t now_ns() {
  timespec t{};
  ::clock_gettime(CLOCK_MONOTONIC, &t);
  return std::int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

// Only async-signal-safe calls here: clock_gettime and _exit are.
void on_signal(int signal) {
  int none = 0;
  const std::int64_t now = now_ns();
  if (first_signal.compare_exchange_strong(none, signal)) {
    first_time_ns.store(now);
    return;
  }
  const std::int64_t first = first_time_ns.load();
  if (first != 0 && now - first > kSameRequestNs) ::_exit(128 + signal);
}

void install(int signal, struct sigaction* before) {
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  // One handler at a time.
  for (const int other : kSignals) sigaddset(&action.sa_mask, other);
  if (::sigaction(signal, &action, before) != 0) throw InternalError("[signals] sigaction failed");
  // nohup(1) has SIGHUP ignored, and means it.
  if (signal == SIGHUP && before->sa_handler == SIG_IGN) ::sigaction(signal, before, nullptr);
}

}  // namespace

StopSignals::StopSignals() {
  if (installed) throw InternalError("[signals] the handlers are installed already");
  first_signal.store(0);
  first_time_ns.store(0);
  for (std::size_t i = 0; i < std::size(kSignals); ++i) install(kSignals[i], &previous[i]);
  installed = true;
}

StopSignals::~StopSignals() {
  for (std::size_t i = 0; i < std::size(kSignals); ++i) ::sigaction(kSignals[i], &previous[i], nullptr);
  installed = false;
}

bool stop_requested() { return first_signal.load(std::memory_order_relaxed) != 0; }
int stop_signal() { return first_signal.load(std::memory_order_relaxed); }

}  // namespace fathom
