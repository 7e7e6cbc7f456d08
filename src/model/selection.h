// How a routed block chooses its tokens: said with every forward pass, never a hidden mode of the model.
#pragma once

#include <cstdint>
#include <span>
#include <variant>

#include "kernels/backend.h"
#include "src/config/config.h"
#include "src/core/tensor.h"

namespace fathom {

class Context;

/// The K largest router scores of each sequence. Looks at the whole sequence: for training and `val_topk`.
struct TopK {};

/// Each token decides from itself alone, as decoding must: sigma(logit) > threshold, where the logit is the
/// router's own (trained by the auxiliary loss) or the predictor's. It holds for routed blocks and, where
/// experts choose, for each expert; where tokens choose, no expert is full. The gate is the main router's in
/// all cases.
struct Causal {
  enum class Logit : std::uint8_t { Router, Predictor } logit = Logit::Router;
  double threshold = 0.5;
  /// Skipped: routed blocks pass all tokens by, and are not even asked: the model as its own draft. Experts
  /// are, where they are left.
  enum class Blocks : std::uint8_t { Asked, Skipped } blocks = Blocks::Asked;
  /// Rows of one pass that have thresholds of their own (row_shifts): stat [N] of a batch of one sequence of
  /// N rows, what is added to each row's logit, which is then compared with 0; `threshold` is not read.
  /// Undefined: all rows have that one.
  Tensor shifts = {};
};

/// Top-k on Gaussian noise: the paper's control. A pure function of (seed, step, layer, sequence of the
/// step), however the step's sequences are shared out: layer l draws from the stream first_stream(step) + l,
/// and a row's number is that of its place in the step.
struct Stochastic {
  std::uint64_t seed = 0;
  std::uint64_t step = 0;
  /// Sequences of the step before the batch's first.
  std::int64_t first = 0;
  /// int64 [1] in the backend's memory, first_stream() of the step, which counts instead of `step` where it
  /// is not null: captured work is launched for other steps than the one it was recorded in.
  ConstView streams_there = {};
};

constexpr std::uint64_t first_stream(std::uint64_t step) {
  constexpr std::uint64_t kLayersApart = 1 << 16;
  return step * kLayersApart;
}

using SelectionRule = std::variant<TopK, Causal, Stochastic>;

/// The inverse of sigma.
double logit(double probability);

/// Causal::shifts of rows with these thresholds, each in (0, 1): every row is decided about as by a pass that
/// has its threshold alone.
Tensor row_shifts(Context& c, std::span<const double> thresholds);

/// What the gate is to the kernels.
GateKind gate_kind(Gate gate);

/// The rule that training uses.
SelectionRule training_rule(const RoutingConfig& routing, std::uint64_t seed, std::uint64_t step);

/// The rule that serves, with the config's threshold. With method `both`, the predictor decides.
/// UserError when there is none: the model was trained with causal.method none.
Causal causal_rule(const RoutingConfig& routing);

}  // namespace fathom
