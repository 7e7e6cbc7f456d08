#include "infer/speculate/speculation.h"

#include <algorithm>

#include <fmt/format.h>

#include "infer/speculate/ngram_level.h"
#include "kernels/error.h"
#include "src/core/stopwatch.h"

namespace fathom {

namespace {

using Method = SpeculationOptions::Method;
using Draft = SpeculationOptions::Draft;

bool retrieves(const SpeculationOptions& o) {
  return o.method == Method::Triforce || o.method == Method::Retrieval;
}
bool drafts(const SpeculationOptions& o) { return o.method == Method::Triforce || o.method == Method::Draft; }
bool skips(const SpeculationOptions& o) { return drafts(o) && o.draft == Draft::SelfSkip; }

}  // namespace

double SpeculationReport::speedup() const {
  if (levels.empty() || seconds <= 0) return 0;
  const LevelCounts& n = levels.back().counts;
  return n.plain_passes > 0
             ? static_cast<double>(tokens) * n.plain_seconds / static_cast<double>(n.plain_passes) / seconds
             : 0;
}

double SpeculationReport::tokens_a_pass() const {
  const auto passes = levels.empty() ? 0 : levels.back().counts.passes;
  return passes > 0 ? static_cast<double>(tokens) / static_cast<double>(passes) : 0;
}

std::int64_t tokens_beside(const SpeculationOptions& o) {
  std::int64_t tokens = 0;
  // What is there twice for a moment: the old window and the new.
  if (retrieves(o)) tokens += o.retrieval.budget + o.retrieval.budget / 8 + 2 * kMostVerified + 128;
  if (skips(o)) tokens += o.window.sinks + 2 * o.window.recent + 2 * kMostVerified;
  return tokens;
}

Speculation::Speculation(const CachedModel& target, const CachedModel* draft,
                         const SpeculationOptions& options, Request request, Chance* chance)
    : experts_(target.model),
      target_(target),
      options_(options),
      request_(std::move(request)),
      ids_(request_.prompt),
      rule_(request_.sampling, options.tokens, static_cast<std::int64_t>(ids_.size())),
      last_(counted(), rule_),
      seeded_(request_.sampling.seed) {
  check(draft);
  build(draft);
  pace_ = make_pace();
  std::vector<Level*> levels;
  for (const auto& level : before_) levels.push_back(level.get());
  levels.push_back(&last_);
  names_.emplace_back("target");
  chain_ =
      std::make_unique<Chain>(levels, chance != nullptr ? *chance : seeded_, *pace_, request_.stop_tokens);
}

CachedModel& Speculation::counted() {
  target_.experts = &experts_;
  return target_;
}

void Speculation::check(const CachedModel* draft) const {
  const std::int64_t context = target_.model.config().max_seq_len;
  check_request(request_, target_.vocab, context, target_.cache);
  if (request_.max_tokens < 1 || request_.logprobs || request_.top_logprobs > 0 || request_.prompt_logprobs)
    throw UserError("Speculative decoding chooses tokens, and gives no log-probabilities.",
                    "Ask for them without it.");
  if (options_.proposals < 0 || options_.proposals > 16 || options_.proposals_between < 1 ||
      options_.proposals_between > 8)
    throw UserError("A number of proposals is out of range.",
                    "It is 1 to 16 for the target, and 1 to 8 for the level between.");
  const auto prompt = static_cast<std::int64_t>(request_.prompt.size());
  if (retrieves(options_)) {
    const auto [budget, chunk] = options_.retrieval;
    if (chunk < 1 || budget < 4 * chunk)
      throw UserError(
          fmt::format("A retrieval budget of {} entries is less than four chunks of {}.", budget, chunk),
          "Give a larger budget, or smaller chunks.");
    if (budget >= context)
      throw UserError(
          fmt::format("A retrieval budget of {} entries leaves nothing out of this model's context of {}.",
                      budget, context),
          "Give a smaller budget, or decode without retrieval.");
    const std::int64_t retrieved = std::min(budget, prompt + request_.max_tokens);
    if (!target_.cache.could_hold(prompt + retrieved))
      throw UserError(fmt::format("The cache ({} blocks of {}) has no room for {} entries that are retrieved "
                                  "beside the {} tokens "
                                  "of the prompt.",
                                  target_.cache.pool().blocks(), target_.cache.block(), retrieved, prompt),
                      "Give the cache more memory, or retrieve less.");
  }
  if (!drafts(options_)) return;
  if (options_.draft == Draft::SelfSkip) {
    const auto routed = static_cast<std::int64_t>(target_.model.routed_layers().size());
    if (routed == 0)
      throw UserError("This model has no routed blocks, so it is no draft of itself with those skipped.",
                      "Draft by a small model, or by n-grams.");
    if (routed == target_.model.config().depth)
      throw UserError("All blocks of this model are routed: nothing of it is left when they are skipped.",
                      "Draft by a small model, or by n-grams.");
  }
  if (options_.draft != Draft::Model) return;
  if (draft == nullptr) throw InternalError("[speculate] no draft model");
  const std::int64_t longest = std::min(context, prompt + request_.max_tokens);
  if (draft->model.config().max_seq_len < longest)
    throw UserError(fmt::format("The draft's context is {} tokens, and this text may come to {}.",
                                draft->model.config().max_seq_len, longest),
                    "Take a draft that was trained with a longer context, or ask for fewer tokens.");
  if (draft->model.config().vocab_size < target_.vocab)
    throw UserError(fmt::format("The draft's vocabulary has {} ids, and the model's {}.",
                                draft->model.config().vocab_size, target_.vocab),
                    "Take a draft of the same tokenizer.");
}

void Speculation::build(const CachedModel* draft) {
  const auto add = [&](std::unique_ptr<Level> level, const char* name) {
    before_.push_back(std::move(level));
    names_.emplace_back(name);
  };
  const auto add_gathered = [&](std::unique_ptr<GatheredLevel> level, const char* name) {
    gathered_.push_back(level.get());
    add(std::move(level), name);
  };
  if (options_.method == Method::Ngram || (drafts(options_) && options_.draft == Draft::Ngram)) {
    add(std::make_unique<NgramLevel>(rule_, target_.vocab), "ngram");
  } else if (skips(options_)) {
    add_gathered(std::make_unique<SelfSkipLevel>(last_, rule_, options_.window), "self-skip");
  } else if (drafts(options_)) {
    CachedModel m = *draft;
    m.vocab = target_.vocab;
    add(std::make_unique<WindowLevel>(m, rule_, options_.window), "draft");
  }
  if (retrieves(options_)) {
    const bool is_first = before_.empty();
    add_gathered(std::make_unique<RetrievalLevel>(last_, rule_, is_first, options_.retrieval), "retrieval");
  }
}

std::unique_ptr<Pace> Speculation::make_pace() const {
  if (options_.proposals == 0)
    return std::make_unique<AdaptivePace>(
        AdaptivePace::Limits{.levels = static_cast<std::int64_t>(before_.size()) + 1});
  std::vector<std::int64_t> proposals(before_.size(), options_.proposals_between);
  if (!proposals.empty()) proposals.back() = options_.proposals;
  return std::make_unique<FixedPace>(proposals, options_.plain_first);
}

// How many tokens the next cycle may add. Where memory ends, the target has what the others had.
std::int64_t Speculation::room() {
  const auto size = static_cast<std::int64_t>(ids_.size());
  const std::int64_t generated = size - static_cast<std::int64_t>(request_.prompt.size());
  const std::int64_t context = target_.model.config().max_seq_len;
  const std::int64_t most =
      std::min({request_.max_tokens - generated, std::max<std::int64_t>(1, context - size), kMostVerified});
  const auto fits = [&](std::int64_t rows) { return target_.cache.has_room(last_.sequence(), rows, rows); };
  if (fits(most)) return most;
  for (GatheredLevel* level : gathered_) level->release();
  return fits(most) ? most : 1;
}

Speculation::Step Speculation::step() {
  if (!begun_) {
    last_.read(ids_);
    chain_->settle(ids_);
    begun_ = true;
  }
  const Stopwatch watch;
  const std::size_t before = ids_.size();
  chain_->cycle(ids_, room());
  seconds_ += watch.seconds();
  Step step;
  step.tokens.assign(ids_.begin() + static_cast<std::ptrdiff_t>(before), ids_.end());
  const auto size = static_cast<std::int64_t>(ids_.size());
  if (chain_->stops(ids_.back())) {
    step.tokens.pop_back();
    step.finish = Finish::Stop;
  } else if (size - static_cast<std::int64_t>(request_.prompt.size()) >= request_.max_tokens ||
             size >= target_.model.config().max_seq_len) {
    step.finish = Finish::Length;
  }
  return step;
}

void Speculation::end(std::int64_t tokens) {
  const std::size_t size = request_.prompt.size() + static_cast<std::size_t>(tokens);
  if (size > ids_.size()) throw InternalError("[speculate] fewer tokens than are to be left");
  ids_.resize(size);
  behind_the_end_ = chain_->counts().back().tokens - tokens;
}

std::vector<double> Speculation::routed_fraction() const {
  std::vector<double> shares;
  const SequenceId id = last_.sequence();
  const std::int64_t tokens = std::min(std::ssize(ids_), target_.cache.tokens(id));
  for (const std::int64_t layer : target_.model.routed_layers())
    shares.push_back(static_cast<double>(target_.cache.entries_of(id, layer, tokens)) /
                     static_cast<double>(std::max<std::int64_t>(1, tokens)));
  return shares;
}

SpeculationReport Speculation::report() const {
  SpeculationReport r;
  const std::vector<LevelCounts>& counts = chain_->counts();
  for (std::size_t i = 0; i < counts.size(); ++i) {
    r.levels.push_back({names_[i], counts[i], 0});
    if (i >= before_.size()) continue;
    if (const auto* g = dynamic_cast<const GatheredLevel*>(before_[i].get()))
      r.levels.back().gatherings = g->gatherings();
  }
  r.seconds = seconds_;
  r.levels.back().counts.tokens -= behind_the_end_;
  r.tokens = r.levels.back().counts.tokens;
  return r;
}

}  // namespace fathom
