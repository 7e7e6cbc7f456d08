// The work of one HTTP request: some texts for the engine, and who hears of them.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "infer/engine.h"
#include "serve/answer_text.h"
#include "serve/api_error.h"

namespace fathom::serve {

using Clock = std::chrono::steady_clock;

struct TextRequest {
  Request request;  // the engine's
  std::vector<std::string> stops = {};
  bool trims = false;  // white space at the answer's beginning
};

/// What a step did for one text of a job.
struct TextUpdate {
  std::size_t text = 0;  // its place in Job::texts
  Piece piece;
  std::vector<double> prompt_logprobs = {};  // further ones, in the prompt's order
  std::vector<std::vector<SampledToken>> prompt_alternatives = {};
  Finish finish = Finish::None;  // Stop or Length: the last update of this text, with
  std::int64_t tokens = 0;       // what was chosen in all, and
  std::vector<double> routed_fraction = {};
  std::int64_t cached_tokens = 0;                    // of the prompt
  std::int64_t verifications = 0;                    // cycles of speculation, and
  std::int64_t verified_tokens = 0;                  // the tokens that came of them
  std::vector<std::vector<std::uint8_t>> kept = {};  // further ones (Event::kept), with any update
};

/// Called on the engine's thread, which waits meanwhile. What it throws ends its job, and no other.
class JobListener {
 public:
  virtual ~JobListener() = default;
  virtual void updated(std::vector<TextUpdate> updates) = 0;
  /// The job is over, whatever had come of it.
  virtual void failed(const ApiError& error) = 0;
};

struct Job {
  std::vector<TextRequest> texts;
  std::shared_ptr<JobListener> listener;
  Clock::time_point deadline = Clock::time_point::max();
};

using JobId = std::int64_t;

}  // namespace fathom::serve
