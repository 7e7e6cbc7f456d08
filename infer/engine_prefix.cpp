// What the engine's texts share that begin alike (prefix_cache.h).
#include <algorithm>
#include <utility>

#include "infer/engine.h"

namespace fathom {

double Engine::prefix_key(const Running& r) const {
  return model_.routing().kind == RoutingKind::None ? 0 : threshold_of(r);
}

// How many of its ids a text may find in the cache: those behind whose rows nothing is asked for.
std::int64_t Engine::may_adopt(const Running& r) const {
  if (!prefixes_ || !r.request.prefix_cache || r.recomputes || r.begun) return 0;
  const std::int64_t needed = r.computed + r.left() - 1;
  const bool scores =
      r.request.prompt_logprobs && r.scored < static_cast<std::int64_t>(r.request.prompt.size());
  return scores ? std::min(needed, r.scored - 1) : needed;
}

// A sequence that has begun nothing goes on from the most that others left.
void Engine::adopt(Running& r) {
  const std::int64_t most = may_adopt(r);
  if (most < r.adopted + cache_.block()) return;
  const auto segments =
      prefixes_->find(prefix_key(r), std::span(r.ids).first(static_cast<std::size_t>(most)));
  const std::int64_t found = static_cast<std::int64_t>(segments.size()) * cache_.block();
  if (found <= r.adopted) return;
  r.computed = r.adopted = r.remembered = 0;
  const SequenceId before = std::exchange(r.sequence, cache_.add());
  cache_.remove(before);
  cache_.adopt(r.sequence, segments);
  r.computed = r.adopted = r.remembered = found;
}

// Before the first rows of a sequence.
void Engine::begin(Running& r) {
  if (r.begun) return;
  r.begun = true;
  cache_.own_tails(c_, r.sequence);
  if (few_are_written() && cycles_->watches()) cache_.watch(r.sequence);
  stats_.prefix_hit_tokens += r.adopted;
  if (r.cached < 0) r.cached = r.adopted;
}

void Engine::remember(Running& r) {
  const std::int64_t whole = r.computed / cache_.block() * cache_.block();
  if (!prefixes_ || !r.request.prefix_cache || r.is_assumed || whole <= r.remembered) return;
  prefixes_->remember(prefix_key(r), std::span(r.ids).first(static_cast<std::size_t>(whole)), r.sequence);
  r.remembered = whole;
}

}  // namespace fathom
