// Passes over a row of logits that are as fast as reading it: what greedy choices and guesses need, where
// speculative decoding looks at rows of a vocabulary several times a millisecond.
#pragma once

#include <cstdint>
#include <span>

namespace fathom {

struct GreatestLogit {
  std::int32_t id = -1;  // of equal ones the lowest; -1: not `finite`
  bool finite = false;   // none of the logits is NaN or +infinity, and one at least is not -infinity
};
GreatestLogit greatest_logit(std::span<const float> logits);

/// The share of the softmax over finite logits (-infinity is a token that cannot come) that `id` has, to 1 %:
/// to guess by, not to draw by.
double rough_share(std::span<const float> logits, std::int32_t id);

}  // namespace fathom
