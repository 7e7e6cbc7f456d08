#include "infer/speculate/speculative_cycles.h"

#include <algorithm>
#include <cmath>
#include <new>

#include "infer/engine.h"
#include "kernels/error.h"

namespace fathom {

SpeculativeCycles::SpeculativeCycles(const CachedModel& target, const CachedModel* draft,
                                     const SpeculationOptions& options, std::int64_t most_texts)
    : target_(target), draft_(draft), options_(options), most_texts_(most_texts) {
  check_speculation(target_, draft_, options_, 0, target_.model.config().max_seq_len);
  passes_ = ShortPasses::open(target_.c, target_.model, target_.rule, target_.cache);
  target_.passes = passes_.get();
  if (options_.drafts() && options_.draft == SpeculationOptions::Draft::SelfSkip) {
    Causal skipping = target_.rule;
    skipping.blocks = Causal::Blocks::Skipped;
    skipping_ = ShortPasses::open(target_.c, target_.model, skipping, target_.cache);
    target_.skipping = skipping_.get();
  }
  const LevelChain levels(target_, draft_, options_, {}, 0, {}, TargetLevel::Sequence::Borrowed);
  for (const std::string& name : levels.names()) stats_.levels.push_back({.name = name});
}

// By ratios a text is the seed's, the number of proposals' and the moment's at which others came. Who names a
// seed wants the text that he had before.
bool SpeculativeCycles::takes(RequestId id, const Request& request) {
  const auto [found, is_new] = texts_.try_emplace(id);
  Text& text = found->second;
  if (is_new && request.repeatable && request.sampling.temperature > 0 &&
      options_.tokens == RowRule::Tokens::Drawn) {
    text.is_plain = true;
    ++stats_.plain_texts["seed"];
  }
  return !text.is_plain;
}

void SpeculativeCycles::begin(Text& text, const CycleText& of) const {
  if (text.levels == nullptr) {
    CachedModel m = target_;
    m.rule.threshold = of.request.threshold.value_or(m.rule.threshold);
    text.levels =
        std::make_unique<LevelChain>(m, draft_, options_, of.request.sampling, std::ssize(of.request.prompt),
                                     of.request.stop_tokens, TargetLevel::Sequence::Borrowed);
    if (of.request.logprobs || of.request.top_logprobs > 0) text.levels->target().want_logits();
  }
  if (text.sequence == of.sequence && text.ids.size() == of.ids.size()) return;
  text.ids.assign(of.ids.begin(), of.ids.end());
  text.sequence = of.sequence;
  text.levels->target().borrow(of.sequence, of.ids, text.levels->watches());
  text.levels->chain().fell_behind();
}

bool SpeculativeCycles::cycle(const CycleText& of, Cycle& result) {
  Text& text = texts_[of.id];
  try {
    begin(text, of);
    run(text, of, result);
    return true;
  } catch (const UserError&) {
    // There is no memory, or numbers are not finite: if that is the text's own trouble, its next pass says
    // so.
  } catch (const std::bad_alloc&) {
  }
  target_.cache.truncate(of.sequence, std::ssize(of.ids) - 1);
  text = Text();
  text.is_plain = true;
  ++stats_.plain_texts["failed"];
  return false;
}

void SpeculativeCycles::run(Text& text, const CycleText& of, Cycle& result) {
  const std::int64_t first = std::ssize(text.ids);
  const std::int64_t generated = first - std::ssize(of.request.prompt);
  const std::int64_t most = std::min(
      {of.request.max_tokens - generated, target_.model.config().max_seq_len - first, kMostVerified});
  LevelChain& levels = *text.levels;
  const std::vector<LevelCounts> before = levels.chain().counts();
  levels.chain().cycle(text.ids, levels.room(std::max<std::int64_t>(1, most)));
  count(levels, before);
  result = {};
  for (auto at = static_cast<std::size_t>(first); at < text.ids.size(); ++at) {
    const auto logits = [&] { return levels.target().logits(at - static_cast<std::size_t>(first)); };
    result.tokens.push_back(
        {text.ids[at], of.request.logprobs ? logprob_of(logits(), text.ids[at], at) : NAN});
    if (of.request.top_logprobs > 0)
      result.alternatives.push_back(most_likely(logits(), of.request.top_logprobs));
  }
}

void SpeculativeCycles::count(const LevelChain& levels, const std::vector<LevelCounts>& before) {
  const std::vector<LevelCounts>& now = levels.chain().counts();
  for (std::size_t i = 0; i < now.size(); ++i) {
    CycleStats::Level& sum = stats_.levels[i];
    sum.passes += now[i].passes - before[i].passes;
    sum.proposed += now[i].proposed - before[i].proposed;
    sum.accepted += now[i].accepted - before[i].accepted;
    sum.tokens += now[i].tokens - before[i].tokens;
  }
}

bool SpeculativeCycles::give_up() {
  bool held = false;
  for (auto& [id, text] : texts_) held = (text.levels != nullptr && text.levels->release()) || held;
  stats_.given_up += held ? 1 : 0;
  return held;
}

void SpeculativeCycles::leave(RequestId id) {
  const auto found = texts_.find(id);
  if (found == texts_.end()) return;
  found->second.sequence = -1;
  if (found->second.levels != nullptr) found->second.levels->release();
}

}  // namespace fathom
