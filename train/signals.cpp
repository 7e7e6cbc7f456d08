#include "train/signals.h"

#include <atomic>
#include <cstdint>

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
struct sigaction previous_term;
struct sigaction previous_int;

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

void install(int signal, struct sigaction* previous) {
  struct sigaction action {};
  action.sa_handler = on_signal;
  action.sa_flags = SA_RESTART;
  sigemptyset(&action.sa_mask);
  // One handler at a time.
  sigaddset(&action.sa_mask, SIGTERM);
  sigaddset(&action.sa_mask, SIGINT);
  if (::sigaction(signal, &action, previous) != 0) throw InternalError("[signals] sigaction failed");
}

}  // namespace

StopSignals::StopSignals() {
  if (installed) throw InternalError("[signals] the handlers are installed already");
  first_signal.store(0);
  first_time_ns.store(0);
  install(SIGTERM, &previous_term);
  install(SIGINT, &previous_int);
  installed = true;
}

StopSignals::~StopSignals() {
  ::sigaction(SIGTERM, &previous_term, nullptr);
  ::sigaction(SIGINT, &previous_int, nullptr);
  installed = false;
}

bool stop_requested() { return first_signal.load(std::memory_order_relaxed) != 0; }
int stop_signal() { return first_signal.load(std::memory_order_relaxed); }

}  // namespace fathom
