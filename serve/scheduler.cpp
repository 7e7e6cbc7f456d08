#include "serve/scheduler.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "kernels/error.h"
#include "serve/serve_metrics.h"

namespace fathom::serve {

namespace {

double seconds_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

Scheduler::Scheduler(Engine& engine, const Tokenizer& tokenizer, const SchedulerOptions& options,
                     ServeMetrics& metrics)
    : engine_(engine), tokenizer_(tokenizer), options_(options), metrics_(metrics), stats_(engine.stats()) {}

Scheduler::~Scheduler() = default;

JobId Scheduler::submit(Job job) {
  const auto count = static_cast<std::int64_t>(job.texts.size());
  JobId id = 0;
  {
    const std::lock_guard lock(mutex_);
    if (draining_) throw unavailable("The server is stopping.", 10);
    const std::int64_t most = options_.sequences + options_.queue;
    // Coming again would not help.
    if (count > most)
      throw ApiError(fmt::format("The request asks for {} texts: at most {} at once here.", count, most),
                     {.code = "invalid_value"});
    if (open_ + count > most) {
      throw ApiError(
          fmt::format("Too many requests: {} texts are being written or wait, and the limit is {}.", open_,
                      most),
          {.status = 429,
           .type = "rate_limit_error",
           .code = "queue_full",
           .retry_after = room_.seconds_until(open_ + count - most, Clock::now())});
    }
    if (open_ == 0) room_.began(Clock::now());
    id = next_++;
    open_ += count;
    OpenJob open{.job = std::move(job), .arrived = Clock::now(), .ids = {}, .left = count};
    inbox_.emplace(id, std::move(open));
  }
  work_.notify_one();
  return id;
}

void Scheduler::cancel(JobId id) {
  {
    const std::lock_guard lock(mutex_);
    cancelled_.push_back(id);
  }
  work_.notify_one();
}

void Scheduler::drain(Clock::time_point until) {
  {
    const std::lock_guard lock(mutex_);
    draining_ = true;
    until_ = std::min(until, until_);
  }
  work_.notify_one();
}

EngineStats Scheduler::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void Scheduler::run() {
  while (wait_for_work()) {
    take_inbox();
    fail_late();
    if (!step()) return;
    publish();
  }
}

// False: it has drained.
bool Scheduler::wait_for_work() {
  std::unique_lock lock(mutex_);
  if (draining_ && Clock::now() >= until_) {
    lock.unlock();
    take_inbox();
    fail_all(unavailable("The server has stopped before the text was done.", 10));
    publish();
    return false;
  }
  if (engine_.idle() && inbox_.empty() && cancelled_.empty()) {
    if (draining_) return false;
    work_.wait(lock, [&] { return draining_ || !inbox_.empty() || !cancelled_.empty(); });
  }
  return true;
}

void Scheduler::take_inbox() {
  std::map<JobId, OpenJob> inbox;
  std::vector<JobId> cancelled;
  {
    const std::lock_guard lock(mutex_);
    inbox.swap(inbox_);
    cancelled.swap(cancelled_);
  }
  for (const JobId id : cancelled) {
    if (const auto waits = inbox.find(id); waits != inbox.end()) {
      close_texts(waits->second.left);
      inbox.erase(waits);
    } else if (jobs_.contains(id)) {
      forget(id);
    } else {
      continue;
    }
    metrics_.count_cancelled();
  }
  for (auto& [id, job] : inbox) start(id, std::move(job));
}

void Scheduler::start(JobId id, OpenJob job) {
  OpenJob& open = jobs_.emplace(id, std::move(job)).first->second;
  try {
    for (std::size_t i = 0; i < open.job.texts.size(); ++i) {
      TextRequest& text = open.job.texts[i];
      OpenText answer;
      answer.job = id;
      answer.index = i;
      answer.answer =
          std::make_unique<AnswerText>(tokenizer_, std::move(text.stops), text.request.prompt, text.trims);
      const RequestId request = engine_.submit(std::move(text.request));
      open.ids.push_back(request);
      texts_.emplace(request, std::move(answer));
    }
  } catch (const UserError& e) {
    fail(id, ApiError(e.what(), {}));
  } catch (const std::exception& e) {
    spdlog::error("A request could not be begun: {}", e.what());
    fail(id, server_error("The request could not be begun."));
  }
}

void Scheduler::fail_late() {
  const auto now = Clock::now();
  std::vector<JobId> late;
  for (const auto& [id, job] : jobs_) {
    if (job.job.deadline <= now) late.push_back(id);
  }
  for (const JobId id : late)
    fail(id, ApiError("The text was not done within the server's time for a request.",
                      {.status = 504, .type = "timeout_error", .code = "deadline_exceeded"}));
}

// False: there is no going on.
bool Scheduler::step() {
  std::vector<Event> events;
  try {
    events = engine_.step();
  } catch (const DeviceError&) {
    fail_all(server_error("The device has failed."));
    publish();
    throw;
  } catch (const std::exception& e) {
    // Those of this pass are gone without an event, and nobody knows which they were.
    spdlog::error("A step of the engine failed, and the texts that it was writing with it: {}", e.what());
    fail_all(server_error("A step of the engine failed."));
    return true;
  }
  Updates updates;
  for (Event& event : events) take_or_fail(event, updates);
  for (auto& [id, of_job] : updates) tell(id, std::move(of_job));
  return true;
}

// What goes wrong with one text ends its job and no other.
void Scheduler::take_or_fail(Event& event, Updates& updates) {
  const auto text = texts_.find(event.request);
  if (text == texts_.end()) return;
  const JobId id = text->second.job;
  try {
    take(event, updates);
  } catch (const std::exception& e) {
    spdlog::error("A text could not be gone on with: {}", e.what());
    if (jobs_.contains(id)) fail(id, server_error("The text could not be gone on with."));
  }
}

void Scheduler::tell(JobId id, std::vector<TextUpdate> updates) {
  const auto job = jobs_.find(id);
  if (job == jobs_.end()) return;  // another of its texts has failed
  const std::shared_ptr<JobListener> listener = job->second.job.listener;
  if (job->second.left == 0) {
    metrics_.observe_request(seconds_between(job->second.arrived, Clock::now()));
    jobs_.erase(job);
  }
  try {
    listener->updated(std::move(updates));
  } catch (const std::exception& e) {
    spdlog::error("A request did not hear of its texts: {}", e.what());
    if (jobs_.contains(id)) forget(id);
    tell_failed(*listener, server_error("The server has failed to answer."));
  }
}

void Scheduler::tell_failed(JobListener& listener, const ApiError& error) {
  try {
    listener.failed(error);
  } catch (const std::exception& e) {
    spdlog::error("A request did not hear of its end: {}", e.what());
  }
}

void Scheduler::take(Event& event, Updates& updates) {
  const auto found = texts_.find(event.request);
  if (found == texts_.end()) return;
  OpenText& text = found->second;
  if (event.finish == Finish::Error) {
    spdlog::warn("A text failed: {}", event.error);
    fail(text.job, server_error(event.error));
    return;
  }
  TextUpdate update;
  update.text = text.index;
  update.finish = event.finish;
  update.prompt_logprobs = std::move(event.prompt_logprobs);
  update.prompt_alternatives = std::move(event.prompt_alternatives);
  update.kept = std::move(event.kept);
  update.routed_fraction = std::move(event.routed_fraction);
  update.cached_tokens = event.cached_tokens;
  update.verifications = event.verifications;
  update.verified_tokens = event.verified_tokens;
  if (event.has_token) {
    count_token(text, jobs_.at(text.job));
    update.piece = text.answer->add(event.token, std::move(event.alternatives));
  }
  if (text.answer->stopped()) {
    // The token that completes the stop string may have been the last one anyhow.
    if (event.is_of_cycle) {
      engine_.cancel(event.request);  // what was chosen behind the stop string is nobody's
    } else if (event.finish == Finish::None) {
      Event end = engine_.stop(event.request);
      update.routed_fraction = std::move(end.routed_fraction);
      update.cached_tokens = end.cached_tokens;
      update.verifications = end.verifications;
      update.verified_tokens = end.verified_tokens;
      std::move(end.kept.begin(), end.kept.end(), std::back_inserter(update.kept));
    }
    update.finish = Finish::Stop;
  } else if (event.finish != Finish::None) {
    Piece rest = event.has_stop_token ? text.answer->end(event.token, std::move(event.alternatives))
                                      : text.answer->rest();
    update.piece.text += rest.text;
    std::move(rest.tokens.begin(), rest.tokens.end(), std::back_inserter(update.piece.tokens));
  }
  const bool done = update.finish != Finish::None;
  update.tokens = text.tokens;
  const JobId job = text.job;
  if (done) end_text(found);
  if (done || !update.piece.text.empty() || !update.piece.tokens.empty() || !update.kept.empty() ||
      !update.prompt_logprobs.empty())
    updates[job].push_back(std::move(update));
}

void Scheduler::count_token(OpenText& text, OpenJob& job) {
  const auto now = Clock::now();
  if (!job.has_token) metrics_.observe_first_token(seconds_between(job.arrived, now));
  job.has_token = true;
  if (text.tokens > 0) metrics_.observe_inter_token(seconds_between(text.last_token, now));
  text.last_token = now;
  ++text.tokens;
}

void Scheduler::end_text(std::map<RequestId, OpenText>::iterator text) {
  OpenJob& job = jobs_.at(text->second.job);
  std::erase(job.ids, text->first);
  --job.left;
  texts_.erase(text);
  close_texts(1);
}

void Scheduler::fail(JobId id, const ApiError& error) {
  const std::shared_ptr<JobListener> listener = jobs_.at(id).job.listener;
  forget(id);
  tell_failed(*listener, error);
}

void Scheduler::fail_all(const ApiError& error) {
  while (!jobs_.empty()) fail(jobs_.begin()->first, error);
}

void Scheduler::forget(JobId id) {
  const auto found = jobs_.find(id);
  OpenJob& job = found->second;
  for (const RequestId request : job.ids) {
    engine_.cancel(request);
    texts_.erase(request);
  }
  const std::int64_t left = job.left;
  jobs_.erase(found);
  close_texts(left);
}

void Scheduler::close_texts(std::int64_t count) {
  const std::lock_guard lock(mutex_);
  open_ -= count;
  for (std::int64_t i = 0; i < count; ++i) room_.ended(Clock::now());
}

void Scheduler::publish() {
  const std::lock_guard lock(mutex_);
  stats_ = engine_.stats();
}

}  // namespace fathom::serve
