// Choosing the next token from logits.
//
// Logits become probabilities in this order: logit_bias is added; ids that the text holds are penalised; the
// temperature divides; then top_k, top_p and min_p each leave out tokens, among those that are left.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

namespace fathom {

struct SamplingOptions {
  double temperature = 0.8;  // 0: the most likely token
  std::int64_t top_k = 0;    // only the k most likely tokens; 0: all
  double top_p =
      1.0;           // nucleus (Holtzman et al. 2020): the smallest set of tokens that holds this probability
  double min_p = 0;  // only tokens at least so likely, as a share of the most likely one's probability
  /// Of ids in the prompt or the text so far: positive logits are divided by it, negative ones multiplied
  /// (Keskar et al. 2019). 1: none.
  double repetition_penalty = 1.0;
  /// Of ids in the text so far, the prompt excluded: subtracted once, and once for each time.
  double presence_penalty = 0;
  double frequency_penalty = 0;
  std::map<std::int32_t, double> logit_bias = {};  // added to the logits of these ids
  std::uint64_t seed = 1;

  /// Nothing but the temperature makes probabilities of logits.
  bool temperature_alone() const {
    return top_k == 0 && top_p >= 1 && min_p == 0 && !penalises() && logit_bias.empty();
  }
  bool penalises() const {
    return repetition_penalty != 1.0 || presence_penalty != 0 || frequency_penalty != 0;
  }
};

/// What the penalties look at.
struct TokenHistory {
  std::span<const std::int32_t> prompt, generated;
};

struct SampledToken {
  std::int32_t id = 0;
  double logprob = 0;  // natural log of its probability, from the logits as they came; NaN: not asked for
};

/// UserError: the logits for token `position` of a text are not finite.
[[noreturn]] void fail_not_finite(std::uint64_t position);

/// Picks from logits [V]; a pure function of (logits, options, position, history). Ties go to the lower id.
/// UserError when a logit is NaN or infinite (-infinity is a token that cannot come). Without `logprob`,
/// which takes a pass of exponentials over the vocabulary, it is left out.
SampledToken sample(std::span<const float> logits, const SamplingOptions& options, std::uint64_t position,
                    const TokenHistory& history = {}, bool logprob = true);

/// What sample() draws from: of every id its probability, [V]. At temperature 0 that is 1 for the id that it
/// gives. UserError as sample().
void probabilities(std::span<const float> logits, const SamplingOptions& options, std::uint64_t position,
                   const TokenHistory& history, std::vector<double>& p);

/// The n most likely tokens and the logs of their probabilities, most likely first; of equal ones the lower
/// id first.
std::vector<SampledToken> most_likely(std::span<const float> logits, std::int64_t n);
/// The log of a token's probability. UserError as sample().
double logprob_of(std::span<const float> logits, std::int32_t id, std::uint64_t position);

/// The place in which the share `u` of [0, 1) of all weights falls, these laid side by side; never one of
/// weight 0. They are not negative, and not all 0.
std::size_t draw(std::span<const double> weights, double u);
/// A uniform number in [0, 1) from (seed, position).
double uniform(std::uint64_t seed, std::uint64_t position);

}  // namespace fathom
