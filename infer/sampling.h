// Choosing the next token from logits.
#pragma once

#include <cstdint>
#include <vector>

namespace fathom {

struct SamplingOptions {
  double temperature = 0.8;  // 0: the most likely token
  double top_p =
      1.0;  // nucleus (Holtzman et al. 2020): the smallest set of tokens that holds this probability
  std::uint64_t seed = 1;
};

struct SampledToken {
  std::int32_t id = 0;
  double logprob = 0;  // natural log of its probability before temperature and top_p
};

/// Picks from logits [V]; a pure function of (logits, options, position). Ties go to the lower id. UserError
/// when a logit is NaN or infinite (-infinity is a token that cannot come).
SampledToken sample(const std::vector<float>& logits, const SamplingOptions& options, std::uint64_t position);

/// A uniform number in [0, 1) from (seed, position).
double uniform(std::uint64_t seed, std::uint64_t position);

}  // namespace fathom
