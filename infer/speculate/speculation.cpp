#include "infer/speculate/speculation.h"

#include <algorithm>

#include "kernels/error.h"
#include "src/core/stopwatch.h"

namespace fathom {

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

Speculation::Speculation(const CachedModel& target, const CachedModel* draft,
                         const SpeculationOptions& options, Request request, Chance* chance)
    : counts_(target.model),
      target_(target),
      options_(options),
      request_(std::move(request)),
      ids_(request_.prompt) {
  check(draft);
  levels_ = std::make_unique<LevelChain>(counted(), draft, options_, request_.sampling, std::ssize(ids_),
                                         request_.stop_tokens, TargetLevel::Sequence::Own, chance);
}

CachedModel& Speculation::counted() {
  target_.counts = &counts_;
  return target_;
}

void Speculation::check(const CachedModel* draft) const {
  check_request(request_, target_.vocab, target_.model.config().max_seq_len, target_.cache);
  if (request_.max_tokens < 1 || request_.logprobs || request_.top_logprobs > 0 || request_.prompt_logprobs)
    throw UserError("Speculative decoding chooses tokens, and gives no log-probabilities.",
                    "Ask for them without it.");
  const auto prompt = std::ssize(request_.prompt);
  check_speculation(target_, draft, options_, prompt, prompt + request_.max_tokens);
}

Speculation::Step Speculation::step() {
  if (!begun_) {
    levels_->target().read(ids_);
    levels_->chain().settle(ids_);
    begun_ = true;
  }
  const Stopwatch watch;
  const std::int64_t before = std::ssize(ids_), context = target_.model.config().max_seq_len;
  const std::int64_t most = std::min({request_.max_tokens - before + std::ssize(request_.prompt),
                                      std::max<std::int64_t>(1, context - before), kMostVerified});
  levels_->chain().cycle(ids_, levels_->room(most));
  seconds_ += watch.seconds();
  Step step;
  step.tokens.assign(ids_.begin() + before, ids_.end());
  const std::int64_t size = std::ssize(ids_);
  if (levels_->chain().stops(ids_.back())) {
    step.tokens.pop_back();
    step.finish = Finish::Stop;
  } else if (size - std::ssize(request_.prompt) >= request_.max_tokens || size >= context) {
    step.finish = Finish::Length;
  }
  return step;
}

void Speculation::end(std::int64_t tokens) {
  const std::size_t size = request_.prompt.size() + static_cast<std::size_t>(tokens);
  if (size > ids_.size()) throw InternalError("[speculate] fewer tokens than are to be left");
  ids_.resize(size);
  behind_the_end_ = levels_->chain().counts().back().tokens - tokens;
}

std::vector<double> Speculation::routed_fraction() const {
  std::vector<double> shares;
  const SequenceId id = levels_->target().sequence();
  const std::int64_t tokens = std::min(std::ssize(ids_), target_.cache.tokens(id));
  for (const std::int64_t layer : target_.model.routed_layers())
    shares.push_back(static_cast<double>(target_.cache.entries_of(id, layer, tokens)) /
                     static_cast<double>(std::max<std::int64_t>(1, tokens)));
  return shares;
}

SpeculationReport Speculation::report() const {
  SpeculationReport r;
  const std::vector<LevelCounts>& counts = levels_->chain().counts();
  for (std::size_t i = 0; i < counts.size(); ++i)
    r.levels.push_back({levels_->names()[i], counts[i], levels_->gatherings(i)});
  r.seconds = seconds_;
  r.levels.back().counts.tokens -= behind_the_end_;
  r.tokens = r.levels.back().counts.tokens;
  return r;
}

}  // namespace fathom
