#include "src/io/ordered_encoder.h"

#include <utility>

namespace fathom {

namespace {

constexpr std::size_t kMaxBytesUnderWay = std::size_t{32} << 20;

}  // namespace

OrderedEncoder::OrderedEncoder(const Tokenizer& tokenizer, int threads) : tokenizer_(tokenizer) {
  for (int i = 0; i < threads; ++i) workers_.emplace_back([this] { work(); });
}

OrderedEncoder::~OrderedEncoder() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    queue_.clear();
  }
  queued_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void OrderedEncoder::submit(std::vector<std::string> texts) {
  auto job = std::make_shared<Job>();
  for (const std::string& text : texts) job->bytes += text.size();
  job->batch.texts = std::move(texts);
  bytes_ += job->bytes;
  order_.push_back(job);
  {
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(job));
  }
  queued_.notify_one();
}

bool OrderedEncoder::full() const { return bytes_ >= kMaxBytesUnderWay; }

EncodedBatch OrderedEncoder::take() {
  const std::shared_ptr<Job> job = std::move(order_.front());
  order_.pop_front();
  bytes_ -= job->bytes;
  {
    std::unique_lock lock(mutex_);
    finished_.wait(lock, [&] { return job->done; });
  }
  if (job->error) std::rethrow_exception(job->error);
  return std::move(job->batch);
}

void OrderedEncoder::work() {
  for (;;) {
    std::shared_ptr<Job> job;
    {
      std::unique_lock lock(mutex_);
      queued_.wait(lock, [this] { return stop_ || !queue_.empty(); });
      if (stop_) return;
      job = std::move(queue_.front());
      queue_.pop_front();
    }
    try {
      for (const std::string& text : job->batch.texts) job->batch.ids.push_back(tokenizer_.encode(text));
    } catch (...) {
      job->error = std::current_exception();  // take() rethrows it
    }
    {
      const std::lock_guard lock(mutex_);
      job->done = true;
    }
    finished_.notify_one();
  }
}

}  // namespace fathom
