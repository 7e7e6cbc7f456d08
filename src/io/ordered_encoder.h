// Encodes documents on several threads and gives them back in the order in which they came.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "src/io/tokenizer.h"

namespace fathom {

/// Some documents, encoded together: a batch is large enough that handing it over costs nothing.
struct EncodedBatch {
  std::vector<std::string> texts;
  std::vector<std::vector<std::int32_t>> ids;  // of each text
};

/// One thread submits and takes; the workers belong to the encoder.
class OrderedEncoder {
 public:
  OrderedEncoder(const Tokenizer& tokenizer, int threads);
  /// Drops what was not taken.
  ~OrderedEncoder();
  OrderedEncoder(const OrderedEncoder&) = delete;
  OrderedEncoder& operator=(const OrderedEncoder&) = delete;

  void submit(std::vector<std::string> texts);
  /// Is so much under way that the caller should take before it submits more?
  bool full() const;
  bool empty() const { return order_.empty(); }
  /// The oldest batch, waiting for it if need be. Rethrows what its encoding threw.
  EncodedBatch take();

 private:
  struct Job {
    EncodedBatch batch;
    std::exception_ptr error;
    std::size_t bytes = 0;
    bool done = false;
  };
  void work();

  const Tokenizer& tokenizer_;
  std::deque<std::shared_ptr<Job>> order_;  // submitted and not taken; the caller's thread only
  std::size_t bytes_ = 0;                   // of the texts in order_
  std::deque<std::shared_ptr<Job>> queue_;  // not started
  bool stop_ = false;
  std::mutex mutex_;
  std::condition_variable queued_;
  std::condition_variable finished_;
  std::vector<std::thread> workers_;
};

}  // namespace fathom
