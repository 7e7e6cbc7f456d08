// Who of the ranks is still there. A thread of each rank sends a pulse over TCP: those of the others to rank
// 0, rank 0's to all. So a rank that was killed is known at once (its connection closes), one that is stopped
// or whose machine hangs when it has been silent for the time-out, and one that answers and never comes to
// where the others wait for it after ten times as long. Rank 0 tells the others what it found.
//
// What was found is thrown where the rank waits for others (Watch::check). A rank that does not wait just
// then is ended by the thread itself, half a second later; so is one that does not get out of its troubles
// within ten.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "train/comm/communicator.h"
#include "train/comm/wire.h"

namespace fathom {

struct WatchOptions {
  int rank = 0;
  std::vector<std::string> hosts;  // by rank
  std::vector<std::string> where;  // by rank, for people: "node7, process 4711"
  double timeout = 120;            // seconds, of the connections too
  double patience = kRankPatience;
  /// Rank 0's text, on every rank: how the ranks find each other.
  std::function<std::string(const std::string&)> text_of_rank_0;
};

class Watch {
 public:
  /// RankError: ranks, which are named, have not come within the time-out, or rank 0 cannot be reached.
  explicit Watch(WatchOptions options);
  /// The others take what comes after this for a proper end.
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  void set_timeout(double seconds) { timeout_ = seconds; }
  void set_progress(std::int64_t step) { step_ = step; }
  /// The rank enters a collective, and has left it.
  void enter() { ++calls_, waiting_ = true; }
  void leave() { waiting_ = false; }

  bool found_loss() const { return lost_; }
  /// RankError when a rank is lost.
  void check();
  /// Communicator::fail.
  bool fail(const std::string& why) noexcept;

 private:
  using Clock = std::chrono::steady_clock;
  struct Peer {
    Wire wire;
    int rank = 0;
    Clock::time_point heard;     // the last message
    std::int64_t calls = 0;      // collectives that it has entered
    bool waiting = false;        // in the last of them
    Clock::time_point entered;   // when that was first heard of
    bool gone = false;           // in order
    std::vector<Message> early;  // what came with its first word
  };

  void await_others(const Listener& listener, const std::string& token);
  void find_rank_0(const std::string& endpoint);
  void run();
  void send_pulses();
  void listen(Clock::time_point now);
  void look_for_silence(Clock::time_point now);
  void look_for_laggards(Clock::time_point now);
  void take(Peer& peer, const Message& message);
  void lose(const std::string& message, bool said_elsewhere);
  void end_the_process_if_it_does_not(Clock::time_point now);
  std::string name_of(int rank) const;
  std::string after_step() const;
  bool speaks_without_rank_0() const;
  double pulse_interval() const;

  WatchOptions options_;
  std::vector<Peer> peers_;  // of rank 0 all others, else rank 0
  Descriptor wake_;          // written to when the thread has to look up
  std::atomic<double> timeout_;
  std::atomic<std::int64_t> step_{0}, calls_{0};
  std::atomic<bool> waiting_{false}, ends_{false}, lost_{false}, claimed_{false};
  std::mutex mutex_;     // of message_ and of what is sent
  std::string message_;  // what was found
  Clock::time_point lost_at_;
  bool said_elsewhere_ = false;  // by rank 0; or, where rank 0 was given up and is back, by those who did
  std::thread thread_;
};

}  // namespace fathom
