// Next tokens that the backend does in steps of one launch (whole_step.h), some of them ahead.
#include <algorithm>
#include <cmath>
#include <utility>

#include "infer/engine.h"

namespace fathom {

std::int64_t Engine::most_whole_rows() const {
  if (whole_ == nullptr) return 0;
  return options_.whole_rows < 0 ? std::min(kMostWholeRows, whole_->most_rows()) : options_.whole_rows;
}

// Whether a part is a text's next token and nothing else.
bool Engine::goes_whole(const Part& part) const {
  const Running& r = *part.request;
  const bool scored = r.request.prompt_logprobs && r.computed + 1 >= r.scored &&
                      r.computed + 1 < static_cast<std::int64_t>(r.request.prompt.size());
  return whole_ != nullptr && part.rows == 1 && r.left() == 1 && r.request.max_tokens > 0 && !scored;
}

// The device chooses where that needs nothing but the logits and the temperature; else it hands them over.
bool Engine::device_chooses(const Running& r) const {
  return !observer_ && !r.request.logprobs && r.request.top_logprobs == 0 &&
         r.request.sampling.temperature_alone() &&
         !(options_.shared_noise && r.request.sampling.temperature > 0);
}

// A step of those that are under way, or of all. The next step is put in line before this one is waited for:
// texts that are not part of it come with the next one.
void Engine::run_whole(std::span<const Part> parts, std::vector<Event>& events) {
  std::vector<StepRow> rows;
  for (const Part& p : parts) {
    const Running& r = *p.request;
    const SamplingOptions& s = r.request.sampling;
    rows.push_back({r.sequence, r.ids.back(), r.computed, s.temperature, s.seed, r.request.threshold});
  }
  const auto is_under_way = [&](const StepRow& row) { return whole_->find(row) >= 0; };
  if (std::none_of(rows.begin(), rows.end(), is_under_way)) {
    whole_->give_up();
    whole_->launch(rows);
  }
  std::vector<std::int32_t> places;
  places.reserve(rows.size());
  for (const StepRow& row : rows) places.push_back(whole_->find(row));
  launch_ahead(parts, std::move(rows), places);
  const std::vector<DecoderResult> results = whole_->wait();
  ++stats_.whole_steps;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    if (places[i] < 0) continue;
    Running& r = *parts[i].request;
    const DecoderResult& result = results[static_cast<std::size_t>(places[i])];
    cache_.commit(r.sequence, result.kept);
    stats_.add(result);
    Event event;
    event.request = r.id;
    stats_.prompt_tokens += r.computed < static_cast<std::int64_t>(r.request.prompt.size()) ? 1 : 0;
    if (result.finite && device_chooses(r)) {
      take(r, {result.token, NAN}, event);
    } else {
      const std::vector<float> logits = whole_->logits(places[i]);
      use_logits(r, r.computed + 1, std::span(logits).first(static_cast<std::size_t>(options_.vocab)), event);
    }
    ++r.computed;
    if (event.finish != Finish::None) finish(r, event);
    if (event.has_token) tell_routing(r, event);
    if (event.has_token || event.finish != Finish::None) events.push_back(std::move(event));
  }
}

// The step behind the one under way, in which each part has a place or none (-1), where all that it needs of
// that one is on the device. A text that ends by a token of its own is computed once more than it need be.
void Engine::launch_ahead(std::span<const Part> parts, std::vector<StepRow> rows,
                          std::span<const std::int32_t> places) {
  if (!options_.launches_ahead || few_are_written() ||
      static_cast<std::int64_t>(running_.size()) > whole_->most_rows())
    return;
  std::vector<StepRow> next;
  std::vector<NewRows> room;
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const Running& r = *parts[i].request;
    StepRow& row = rows[i];
    if (places[i] >= 0) {
      if (!device_chooses(r) || r.recomputes) return;
      if (r.generated() + 1 >= r.request.max_tokens || std::ssize(r.ids) + 1 >= context()) continue;
      row.follows = places[i];
      ++row.position;
    }
    next.push_back(row);
    room.push_back({row.sequence, row.follows < 0 ? 1 : 2});
  }
  if (next.empty()) return;
  // The next step would ask the same of those beginnings that nobody reads.
  while (!cache_.fits(room)) {
    if (!prefixes_ || !prefixes_->forget_one()) return;
  }
  whole_->launch(next);
  for (std::size_t i = 0; i < parts.size(); ++i)
    parts[i].request->went_ahead = parts[i].request->went_ahead || rows[i].follows >= 0;
}

}  // namespace fathom
