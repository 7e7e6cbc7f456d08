#include "train/comm/watch.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <sstream>
#include <utility>

#include <fmt/format.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "train/comm/host.h"
#include "train/comm/rank_error.h"

namespace fathom {

namespace {

using std::chrono::duration;
using std::chrono::milliseconds;

constexpr milliseconds kToBeNoticed{500};  // by a rank that does not wait when another one is lost
constexpr milliseconds kToGetOut{10000};   // of what a rank does then
constexpr milliseconds kToBeHeard{2000};   // by rank 0, when another one fails
constexpr const char* kHint =
    " What was saved stays: the same command with --resume auto goes on from the last checkpoint.";

struct Pulse {
  std::int64_t calls = 0;
  std::int64_t waiting = 0;
};

template <typename T>
std::string bytes_of(const T& value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

double seconds_between(std::chrono::steady_clock::time_point from, std::chrono::steady_clock::time_point to) {
  return duration<double>(to - from).count();
}

std::string make_token() {
  std::random_device random;
  return fmt::format("{:08x}{:08x}{:08x}{:08x}", random(), random(), random(), random());
}

}  // namespace

Watch::Watch(WatchOptions options)
    : options_(std::move(options)),
      wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      timeout_(options_.timeout) {
  const bool one_host = std::all_of(options_.hosts.begin(), options_.hosts.end(),
                                    [&](const std::string& host) { return host == options_.hosts.front(); });
  if (options_.rank == 0) {
    const Listener listener = listen_anywhere(one_host);
    const std::string token = make_token();
    std::string endpoint = fmt::format("{} {}", token, listener.port);
    if (!one_host) {
      for (const std::string& address : host_addresses()) endpoint += " " + address;
    }
    options_.text_of_rank_0(endpoint);
    await_others(listener, token);
  } else {
    find_rank_0(options_.text_of_rank_0(""));
  }
  // Signals are the main thread's.
  sigset_t all, before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  thread_ = std::thread([this] { run(); });
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Watch::~Watch() {
  ends_ = true;
  const std::uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(wake_.get(), &one, sizeof one);
  thread_.join();
  if (lost_) return;
  for (Peer& peer : peers_) peer.wire.send({MessageType::Bye, ""});
}

void Watch::await_others(const Listener& listener, const std::string& token) {
  std::vector<Wire> strangers;
  std::vector<bool> here(options_.where.size());
  here[0] = true;
  const Clock::time_point end =
      Clock::now() + std::chrono::duration_cast<Clock::duration>(duration<double>(options_.timeout));
  while (peers_.size() + 1 < options_.where.size()) {
    if (Clock::now() > end) {
      std::vector<std::string> missing;
      for (std::size_t r = 0; r < here.size(); ++r) {
        if (!here[r]) missing.push_back(name_of(static_cast<int>(r)));
      }
      throw RankError(fmt::format("{} {} not come within {:g} s.", fmt::join(missing, ", "),
                                  missing.size() == 1 ? "has" : "have", options_.timeout),
                      "Its host must reach rank 0's by TCP (" + fmt::format("port {}", listener.port) + ").");
    }
    std::vector<pollfd> waiting{{listener.socket.get(), POLLIN, 0}};
    for (const Wire& wire : strangers) waiting.push_back({wire.fd(), POLLIN, 0});
    if (::poll(waiting.data(), waiting.size(), 100) <= 0) continue;
    if (waiting[0].revents != 0) {
      if (Descriptor socket = accept_from(listener)) strangers.emplace_back(std::move(socket));
    }
    for (Wire& wire : strangers) {
      bool open = true;
      std::vector<Message> messages = wire.receive(open);
      if (messages.empty()) {
        if (!open) wire.close();
        continue;
      }
      std::istringstream hello(messages.front().type == MessageType::Hello ? messages.front().bytes : "");
      std::string given;
      std::size_t rank = 0;
      if (hello >> given >> rank && given == token && rank < here.size() && !here[rank]) {
        here[rank] = true;
        Peer peer;
        peer.wire = std::exchange(wire, Wire());
        peer.rank = static_cast<int>(rank);
        peer.heard = peer.entered = Clock::now();
        peer.early.assign(messages.begin() + 1, messages.end());
        peers_.push_back(std::move(peer));
      } else {
        wire.close();  // somebody else's
      }
    }
    std::erase_if(strangers, [](const Wire& wire) { return !wire; });
  }
}

void Watch::find_rank_0(const std::string& endpoint) {
  std::istringstream words(endpoint);
  std::string token;
  int port = 0;
  words >> token >> port;
  std::vector<std::string> addresses;
  if (options_.hosts[static_cast<std::size_t>(options_.rank)] == options_.hosts[0])
    addresses.emplace_back("127.0.0.1");
  for (std::string address; words >> address;) addresses.push_back(address);
  for (const std::string& address : addresses) {
    Descriptor socket = connect_to(address, port, milliseconds(5000));
    if (!socket) continue;
    Peer peer;
    peer.wire = Wire(std::move(socket));
    peer.heard = peer.entered = Clock::now();
    if (!peer.wire.send({MessageType::Hello, fmt::format("{} {}", token, options_.rank)})) continue;
    peers_.push_back(std::move(peer));
    return;
  }
  throw RankError(fmt::format("Rank {} cannot reach {} by TCP (port {} of {}).", options_.rank, name_of(0),
                              port, fmt::join(addresses, ", ")),
                  "A firewall may be between the two hosts.");
}

double Watch::pulse_interval() const { return std::clamp(timeout_.load() / 4, 0.05, 1.0); }

void Watch::run() {
  for (Peer& peer : peers_) {
    for (const Message& message : std::exchange(peer.early, {})) take(peer, message);
  }
  Clock::time_point looked = Clock::now(), pulsed{};
  while (!ends_) {
    std::vector<pollfd> waiting{{wake_.get(), POLLIN, 0}};
    for (const Peer& peer : peers_) {
      if (peer.wire) waiting.push_back({peer.wire.fd(), POLLIN, 0});
    }
    const double interval = lost_ ? 0.05 : pulse_interval();
    ::poll(waiting.data(), waiting.size(), static_cast<int>(1000 * interval));
    const Clock::time_point now = Clock::now();
    // Who slept itself has not heard what the others said meanwhile.
    if (seconds_between(looked, now) > std::max(timeout_ / 2, 3 * pulse_interval())) {
      for (Peer& peer : peers_) peer.heard = peer.entered = now;
    }
    looked = now;
    if (seconds_between(pulsed, now) >= pulse_interval()) {
      send_pulses();
      pulsed = now;
    }
    listen(now);
    if (!lost_) look_for_silence(now);
    if (!lost_) look_for_laggards(now);
    if (lost_) end_the_process_if_it_does_not(now);
  }
}

void Watch::send_pulses() {
  const std::lock_guard lock(mutex_);
  for (Peer& peer : peers_) peer.wire.send({MessageType::Pulse, bytes_of(Pulse{calls_, waiting_ ? 1 : 0})});
}

void Watch::listen(Clock::time_point now) {
  for (Peer& peer : peers_) {
    if (!peer.wire) continue;
    bool open = true;
    for (const Message& message : peer.wire.receive(open)) {
      peer.heard = now;
      take(peer, message);
    }
    if (open) continue;
    {
      const std::lock_guard lock(mutex_);
      peer.wire.close();
    }
    if (peer.gone || lost_) continue;
    lose(fmt::format("{} ended without a word {}: it was killed, or its machine went down.",
                     name_of(peer.rank), after_step()),
         false);
  }
}

void Watch::take(Peer& peer, const Message& message) {
  switch (message.type) {
    case MessageType::Pulse: {
      Pulse pulse;
      if (message.bytes.size() != sizeof pulse) return;
      std::memcpy(&pulse, message.bytes.data(), sizeof pulse);
      if (pulse.calls != peer.calls) peer.entered = peer.heard;
      peer.calls = pulse.calls;
      peer.waiting = pulse.waiting != 0;
      return;
    }
    case MessageType::Failed:
      lose(fmt::format("{} failed {}: {}", name_of(peer.rank), after_step(), message.bytes), false);
      return;
    case MessageType::Lost:
      lose(message.bytes, true);
      return;
    case MessageType::Bye:
      peer.gone = true;
      return;
    case MessageType::Hello:
      return;
  }
}

void Watch::look_for_silence(Clock::time_point now) {
  for (const Peer& peer : peers_) {
    if (peer.gone || seconds_between(peer.heard, now) < timeout_) continue;
    lose(fmt::format("{} has said nothing for {:g} s (train.rank_timeout), {}: it is stopped, or its machine "
                     "or the network hangs.",
                     name_of(peer.rank), timeout_.load(), after_step()),
         false);
    return;
  }
}

void Watch::look_for_laggards(Clock::time_point now) {
  std::int64_t furthest = waiting_ ? calls_.load() : 0;
  for (const Peer& peer : peers_) {
    if (peer.waiting) furthest = std::max(furthest, peer.calls);
  }
  for (const Peer& peer : peers_) {
    if (peer.gone || peer.calls >= furthest ||
        seconds_between(peer.entered, now) < options_.patience * timeout_)
      continue;
    lose(fmt::format("{} answers, but has not come to where the others wait for it within {:g} s ({:g} "
                     "times train.rank_timeout), {}.",
                     name_of(peer.rank), options_.patience * timeout_, options_.patience, after_step()),
         false);
    return;
  }
}

void Watch::lose(const std::string& message, bool said_elsewhere) {
  {
    const std::lock_guard lock(mutex_);
    if (lost_) return;
    message_ = message;
    said_elsewhere_ = said_elsewhere;
    lost_at_ = Clock::now();
    // One that only seemed to be gone learns of it when it is back.
    for (Peer& peer : peers_) peer.wire.send({MessageType::Lost, message});
    lost_ = true;
  }
}

void Watch::check() {
  if (!lost_) return;
  claimed_ = true;
  const std::lock_guard lock(mutex_);
  throw RankError(message_ + kHint);
}

bool Watch::fail(const std::string& why) noexcept {
  claimed_ = true;
  try {
    if (!lost_ && options_.rank != 0) {
      {
        const std::lock_guard lock(mutex_);
        for (Peer& peer : peers_) peer.wire.send({MessageType::Failed, why});
      }
      const Clock::time_point end = Clock::now() + kToBeHeard;
      while (!lost_ && Clock::now() < end) std::this_thread::sleep_for(milliseconds(5));
    } else if (!lost_) {
      lose(fmt::format("{} failed {}: {}", name_of(0), after_step(), why), false);
      return false;
    }
  } catch (...) {
    return false;
  }
  const std::lock_guard lock(mutex_);
  return lost_ && (said_elsewhere_ || (options_.rank > 0 && !speaks_without_rank_0()));
}

// The main thread is far from where it would learn of the loss, or does not get out: then nobody else tells.
void Watch::end_the_process_if_it_does_not(Clock::time_point now) {
  if (claimed_ && now - lost_at_ < kToGetOut) return;
  if (now - lost_at_ < kToBeNoticed) return;
  const bool speaks = !said_elsewhere_ && (options_.rank == 0 || speaks_without_rank_0());
  if (!claimed_ && speaks) {
    const std::string text = "fathom: " + message_ + kHint + "\n";
    [[maybe_unused]] const ssize_t n = ::write(STDERR_FILENO, text.data(), text.size());
  }
  ::_exit(1);
}

std::string Watch::name_of(int rank) const {
  return fmt::format("Rank {} ({})", rank, options_.where[static_cast<std::size_t>(rank)]);
}

std::string Watch::after_step() const {
  const std::int64_t step = step_;
  return step > 0 ? fmt::format("after step {}", step) : "before the first step";
}

// The first rank of each host, as if rank 0 were not one.
bool Watch::speaks_without_rank_0() const {
  const std::string& host = options_.hosts[static_cast<std::size_t>(options_.rank)];
  for (int r = 1; r < options_.rank; ++r) {
    if (options_.hosts[static_cast<std::size_t>(r)] == host) return false;
  }
  return true;
}

}  // namespace fathom
