// Texts that go on by several tokens at a time (cycles.h), where few are being written.
#include <algorithm>

#include "infer/engine.h"
#include "kernels/error.h"

namespace fathom {

CachedModel Engine::cached_model() {
  return {.c = c_,
          .model = model_,
          .rule = options_.rule,
          .cache = cache_,
          .vocab = options_.vocab,
          .max_rows = options_.max_rows,
          .whole = whole_.get(),
          .counts = &stats_};
}

bool Engine::few_are_written() const {
  return cycles_ != nullptr && !observer_ &&
         static_cast<std::int64_t>(running_.size() + waiting_.size()) <= cycles_->most_texts();
}

bool Engine::goes_by_cycles(const Part& part) const {
  const Running& r = *part.request;
  return part.rows == 1 && r.left() == 1 && r.computed > 0 && r.request.max_tokens > 0 && !r.recomputes &&
         cycles_->takes(r.id, r.request);
}

// One after the other: each is a pass of its own, that takes more room than the row that was asked for.
void Engine::run_cycles(std::span<const Part> parts, std::vector<Event>& events) {
  for (const Part& part : parts) {
    const SequenceId sequence = part.request->sequence;
    if (!cache_.has_room(sequence, 1, 1) && !(cycles_->give_up() && cache_.has_room(sequence, 1, 1)))
      continue;
    run({&part, 1}, events, &Engine::run_cycle);
  }
}

// An event for each token, with what it would have been if the text had ended there: whoever listens may end
// it at any of them.
void Engine::run_cycle(std::span<const Part> parts, std::vector<Event>& events) {
  Running& r = *parts.front().request;
  Cycle cycle;
  r.had_cycles = true;
  const bool is_of_prompt = r.computed < std::ssize(r.request.prompt);  // its last row, behind what is shared
  if (!cycles_->cycle({r.id, r.request, r.sequence, r.ids}, cycle)) return;
  stats_.prompt_tokens += is_of_prompt ? 1 : 0;
  ++r.verifications;
  for (std::size_t i = 0; i < cycle.tokens.size(); ++i) {
    Event event;
    event.request = r.id;
    event.is_of_cycle = true;
    r.computed = std::ssize(r.ids);
    ++r.verified_tokens;
    take(r, cycle.tokens[i], event);
    if (i < cycle.alternatives.size()) event.alternatives = std::move(cycle.alternatives[i]);
    tell_routing(r, event);
    if (event.finish != Finish::None) r.finished = true;
    describe(r, event);
    events.push_back(std::move(event));
    if (r.finished && i + 1 < cycle.tokens.size())
      throw InternalError("[engine] tokens behind the end of a text");
  }
}

}  // namespace fathom
