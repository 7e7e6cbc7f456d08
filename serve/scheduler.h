// One thread owns the engine. Jobs come by a queue, and what steps do for them goes out to their listeners.
#pragma once

#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "infer/engine.h"
#include "serve/job.h"
#include "serve/room_estimate.h"
#include "src/io/tokenizer.h"

namespace fathom::serve {

class ServeMetrics;

struct SchedulerOptions {
  std::int64_t sequences = 64;  // texts that the engine has at the same time, and
  std::int64_t queue = 256;     // those that may wait beside them
};

/// submit, cancel, drain and stats: from any thread. A job is in one of three states: in the inbox, with the
/// engine, or gone; whoever ends it (its last text, a fault, its deadline, cancel) does so once.
class Scheduler {
 public:
  /// All outlive it.
  Scheduler(Engine& engine, const Tokenizer& tokenizer, const SchedulerOptions& options,
            ServeMetrics& metrics);
  ~Scheduler();

  /// ApiError: 400 when it has more texts than there is ever room for, 429 when too many wait, 503 when it
  /// drains.
  JobId submit(Job job);
  /// Its blocks are free before the next step, and its listener hears nothing more after that.
  void cancel(JobId id);
  /// No further jobs; run() returns when those that are there are done, at `until` at the latest.
  void drain(Clock::time_point until);

  /// The engine's loop, on this thread: until it has drained. DeviceError: the device is lost, and all jobs
  /// have failed.
  void run();

  EngineStats stats() const;

 private:
  struct OpenText {
    JobId job = 0;
    std::size_t index = 0;
    std::unique_ptr<AnswerText> answer;
    std::int64_t tokens = 0;
    Clock::time_point last_token;
  };
  struct OpenJob {
    Job job;
    Clock::time_point arrived;
    std::vector<RequestId> ids;  // of texts that the engine has
    std::int64_t left = 0;       // texts that are not done, whoever has them
    bool has_token = false;
  };
  using Updates = std::map<JobId, std::vector<TextUpdate>>;

  bool wait_for_work();
  void take_inbox();
  void start(JobId id, OpenJob job);
  void fail_late();
  bool step();
  void take_or_fail(Event& event, Updates& updates);
  void take(Event& event, Updates& updates);
  void tell(JobId id, std::vector<TextUpdate> updates);
  static void tell_failed(JobListener& listener, const ApiError& error);
  void count_token(OpenText& text, OpenJob& job);
  void end_text(std::map<RequestId, OpenText>::iterator text);
  void fail(JobId id, const ApiError& error);
  void fail_all(const ApiError& error);
  void forget(JobId id);
  void publish();
  void close_texts(std::int64_t count);

  Engine& engine_;
  const Tokenizer& tokenizer_;
  SchedulerOptions options_;
  ServeMetrics& metrics_;

  mutable std::mutex mutex_;
  std::condition_variable work_;
  // Under the mutex:
  std::map<JobId, OpenJob> inbox_;
  std::vector<JobId> cancelled_;
  JobId next_ = 1;
  std::int64_t open_ = 0;  // texts that are not done
  RoomEstimate room_;
  bool draining_ = false;
  Clock::time_point until_ = Clock::time_point::max();
  EngineStats stats_;
  // Of run()'s thread:
  std::map<JobId, OpenJob> jobs_;
  std::map<RequestId, OpenText> texts_;
};

}  // namespace fathom::serve
