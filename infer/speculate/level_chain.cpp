#include "infer/speculate/level_chain.h"

#include <algorithm>

#include <fmt/format.h>

#include "infer/speculate/ngram_level.h"
#include "kernels/error.h"

namespace fathom {

namespace {

using Method = SpeculationOptions::Method;
using Draft = SpeculationOptions::Draft;

bool skips(const SpeculationOptions& o) { return o.drafts() && o.draft == Draft::SelfSkip; }

void check_retrieval(const CachedModel& target, const RetrievalLevel::Options& options, std::int64_t prompt,
                     std::int64_t longest) {
  const auto [budget, chunk] = options;
  const std::int64_t context = target.model.config().max_seq_len;
  if (chunk < 1 || budget < 4 * chunk)
    throw UserError(
        fmt::format("A retrieval budget of {} entries is less than four chunks of {}.", budget, chunk),
        "Give a larger budget, or smaller chunks.");
  if (budget >= context)
    throw UserError(
        fmt::format("A retrieval budget of {} entries leaves nothing out of this model's context of {}.",
                    budget, context),
        "Give a smaller budget, or decode without retrieval.");
  const std::int64_t retrieved = std::min(budget, longest);
  if (!target.cache.could_hold(prompt + retrieved))
    throw UserError(
        fmt::format("The cache ({} blocks of {}) has no room for {} entries that are retrieved beside the {} "
                    "tokens of the prompt.",
                    target.cache.pool().blocks(), target.cache.block(), retrieved, prompt),
        "Give the cache more memory, or retrieve less.");
}

void check_skipping(const Transformer& model) {
  const auto routed = static_cast<std::int64_t>(model.routed_layers().size());
  if (routed == 0)
    throw UserError("This model has no routed blocks, so it is no draft of itself with those skipped.",
                    "Draft by a small model, or by n-grams.");
  if (routed == model.config().depth)
    throw UserError("All blocks of this model are routed: nothing of it is left when they are skipped.",
                    "Draft by a small model, or by n-grams.");
}

void check_draft(const CachedModel& target, const CachedModel& draft, std::int64_t longest) {
  if (draft.model.config().max_seq_len < longest)
    throw UserError(fmt::format("The draft's context is {} tokens, and this text may come to {}.",
                                draft.model.config().max_seq_len, longest),
                    "Take a draft that was trained with a longer context, or ask for fewer tokens.");
  if (draft.model.config().vocab_size < target.vocab)
    throw UserError(fmt::format("The draft's vocabulary has {} ids, and the model's {}.",
                                draft.model.config().vocab_size, target.vocab),
                    "Take a draft of the same tokenizer.");
}

std::unique_ptr<Pace> pace_of(const SpeculationOptions& options, std::size_t before) {
  if (options.proposals == 0)
    return std::make_unique<AdaptivePace>(
        AdaptivePace::Limits{.levels = static_cast<std::int64_t>(before) + 1});
  std::vector<std::int64_t> proposals(before, options.proposals_between);
  if (!proposals.empty()) proposals.back() = options.proposals;
  return std::make_unique<FixedPace>(proposals, options.plain_first);
}

}  // namespace

std::int64_t tokens_beside(const SpeculationOptions& o) {
  std::int64_t tokens = 0;
  // What is there twice for a moment: the old window and the new.
  if (o.retrieves()) tokens += o.retrieval.budget + o.retrieval.budget / 8 + 2 * kMostVerified + 128;
  if (skips(o)) tokens += o.window.sinks + 2 * o.window.recent + 2 * kMostVerified;
  return tokens;
}

void check_speculation(const CachedModel& target, const CachedModel* draft, const SpeculationOptions& options,
                       std::int64_t prompt, std::int64_t longest) {
  if (options.proposals < 0 || options.proposals > 16 || options.proposals_between < 1 ||
      options.proposals_between > 8)
    throw UserError("A number of proposals is out of range.",
                    "It is 1 to 16 for the target, and 1 to 8 for the level between.");
  if (options.retrieves()) check_retrieval(target, options.retrieval, prompt, longest);
  if (skips(options)) check_skipping(target.model);
  if (!options.drafts() || options.draft != Draft::Model) return;
  if (draft == nullptr) throw InternalError("[speculate] no draft model");
  check_draft(target, *draft, std::min(target.model.config().max_seq_len, longest));
}

LevelChain::LevelChain(const CachedModel& target, const CachedModel* draft, const SpeculationOptions& options,
                       const SamplingOptions& sampling, std::int64_t prompt, std::vector<std::int32_t> stops,
                       TargetLevel::Sequence whose, Chance* chance)
    : rule_(sampling, options.tokens, prompt),
      last_(target, rule_, whose),
      watches_(options.retrieves()),
      seeded_(sampling.seed) {
  build(target, draft, options);
  pace_ = pace_of(options, before_.size());
  std::vector<Level*> levels;
  for (const auto& level : before_) levels.push_back(level.get());
  levels.push_back(&last_);
  names_.emplace_back("target");
  chain_ = std::make_unique<Chain>(levels, chance != nullptr ? *chance : seeded_, *pace_, std::move(stops));
}

void LevelChain::build(const CachedModel& target, const CachedModel* draft,
                       const SpeculationOptions& options) {
  const auto add = [&](std::unique_ptr<Level> level, const char* name) {
    before_.push_back(std::move(level));
    names_.emplace_back(name);
  };
  const auto add_gathered = [&](std::unique_ptr<GatheredLevel> level, const char* name) {
    gathered_.push_back(level.get());
    add(std::move(level), name);
  };
  const bool by_sureness = options.proposals == 0;  // the pace goes by it
  if (options.method == Method::Ngram || (options.drafts() && options.draft == Draft::Ngram)) {
    add(std::make_unique<NgramLevel>(rule_), "ngram");
  } else if (skips(options)) {
    add_gathered(std::make_unique<SelfSkipLevel>(last_, rule_, by_sureness, options.window), "self-skip");
  } else if (options.drafts()) {
    CachedModel m = *draft;
    m.vocab = target.vocab;
    add(std::make_unique<WindowLevel>(m, rule_, by_sureness, options.window), "draft");
  }
  if (options.retrieves()) {
    const bool wants_sureness = before_.empty() && by_sureness;
    add_gathered(std::make_unique<RetrievalLevel>(last_, rule_, wants_sureness, options.retrieval),
                 "retrieval");
  }
}

std::int64_t LevelChain::room(std::int64_t most) {
  const KvCache& cache = last_.cached().cache;
  const auto fits = [&] { return cache.has_room(last_.sequence(), most, most); };
  if (fits()) return most;
  release();
  return fits() ? most : 1;
}

bool LevelChain::release() {
  bool held = false;
  for (GatheredLevel* level : gathered_) {
    held = held || level->holds_blocks();
    level->release();
  }
  return held;
}

std::int64_t LevelChain::gatherings(std::size_t level) const {
  if (level >= before_.size()) return 0;
  const auto* gathered = dynamic_cast<const GatheredLevel*>(before_[level].get());
  return gathered != nullptr ? gathered->gatherings() : 0;
}

}  // namespace fathom
