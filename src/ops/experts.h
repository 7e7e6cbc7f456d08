// The ops of an expert layer: how much each token and each choice are for each other, which tokens each
// expert takes, and the way of their rows to the experts and back.
#pragma once

#include <cstdint>
#include <vector>

#include "src/autograd/tape.h"

namespace fathom::ops {

/// What a router of choices says of each row: x W^T, in the stat dtype. x [N, D], w [choices, D] -> [N,
/// choices].
Tensor choice_logits(Context& c, const Tensor& x, const Tensor& w);

/// The softmax over the choices, transposed. logits stat [N, choices] -> {affinity stat [choices, N], lse
/// stat [N]}, lse the log of each softmax's sum of exponentials.
struct Affinity {
  Tensor affinity;
  Tensor lse;
};
Affinity expert_affinity(Context& c, const Tensor& logits);

/// The logits themselves, transposed likewise, with a bias for each choice. logits stat [N, choices], bias
/// stat [choices] or undefined -> stat [choices, N].
Tensor choice_scores(Context& c, const Tensor& logits, const Tensor& bias = {});

/// Which rows of a stream each expert computes.
struct Dispatch {
  ExpertShape shape;
  Tensor rows;   // int32 [E * S]: the row of each slot; -1: an empty slot
  Tensor slots;  // int32 [E, N]: the slot of each row with each expert; -1: none
  /// Where experts choose: all that the choices take (no-ops too, which have no slots), int32 [any], counted
  /// through [choices, N] and ascending.
  Tensor chosen = {};
  /// From experts_above: rows that each expert took.
  std::vector<std::int64_t> taken = {};
};

/// Sequences whose tokens experts choose among.
struct ExpertSequences {
  std::int64_t batch = 0;    // B
  std::int64_t seq = 0;      // T
  std::int64_t experts = 0;  // E: the first so many choices of an affinity
  std::int64_t keep = 0;     // K tokens of each sequence, for each expert
};

/// Expert choice (Zhou et al. 2022): each expert takes the K tokens of each sequence that have the largest
/// affinity for it, in the order of the tokens; of equal ones the lower row. S = B * K. affinity
/// [choices >= E, B*T]. Not differentiable.
Dispatch expert_choice(Context& c, const Tensor& affinity, const ExpertSequences& s);

/// The causal rule: each of the first `experts` choices takes the rows whose score is above the threshold,
/// each row for itself alone. S: as many as the busiest expert takes, at least 1. scores stat [choices >= E,
/// N]. Waits for the device. Not differentiable.
Dispatch experts_above(Context& c, const Tensor& scores, double threshold, std::int64_t experts);

/// x [N, D] -> [E * S, D]: the rows of each expert one after the other; an empty slot is zero.
Tensor expert_gather(Context& c, const Tensor& x, const Dispatch& dispatch);

/// y = the sum over the experts that took a row of affinity * f. f [E * S, D], affinity [choices >= E, N] ->
/// [N, D]; zero where no expert took the row.
Tensor expert_combine(Context& c, const Tensor& f, const Tensor& affinity, const Dispatch& dispatch);

}  // namespace fathom::ops
