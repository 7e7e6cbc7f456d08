// What a configuration costs: FLOPs itemised, parameters, and the horizon that its budget buys. docs/flops.md
// says the convention in full.
//
// Only matrix products count, 2 FLOPs a multiply-add; the backward pass is twice the forward pass; causal
// attention counts the half that is computed; a routed block counts its K = kept_tokens(C, T) tokens and
// K^2/2 scores; experts count the tokens that they take. Every function takes a resolved Config with a
// vocabulary (see resolve); FLOPs are doubles, exact below 2^53.
#pragma once

#include <cstdint>
#include <span>

#include "src/config/config.h"

namespace fathom {

/// FLOPs by term, or anything else that is itemised like them.
struct FlopTerms {
  double attention_proj = 0;    // queries, keys, values, output
  double attention_scores = 0;  // scores, and their product with the values
  double mlp = 0;               // dense MLPs
  double experts = 0;           // expert MLPs, each on the tokens that it takes
  double router =
      0;  // one scalar a token, on all T tokens of a routed block; the choices of an expert router
  double predictor =
      0;  // causal predictors: on all T tokens of a routed block; of experts, on the block's own tokens
  double head = 0;  // logits

  double total() const {
    return attention_proj + attention_scores + mlp + experts + router + predictor + head;
  }
};

/// Forward pass of training (top-k of T = train.seq_len), FLOPs a token.
FlopTerms forward_flops_per_token(const Config& config);

/// Forward and backward pass, FLOPs a token. Recomputation is not counted: it is the engine's choice, not the
/// model's. A predictor reads detached inputs, so the backward pass of its first layer is the weight
/// gradient alone.
FlopTerms train_flops_per_token(const Config& config);

/// Forward and backward pass of one optimizer step.
double train_flops_per_step(const Config& config);

/// Forward pass of causal evaluation, FLOPs a token, when block l computes the share realised_capacity[l] of
/// the tokens (model.depth entries; those of blocks that are not routed are not read) and its experts
/// expert_rows[l] rows for each of these (model.depth entries; not read without experts). Throws
/// InternalError on another length.
FlopTerms causal_flops_per_token(const Config& config, std::span<const double> realised_capacity,
                                 std::span<const double> expert_rows = {});

struct ParameterCount {
  std::int64_t total = 0;
  /// Parameters that work on a token on average: a routed block's attention, MLP and norms count K / T times,
  /// and so do its experts' router and predictor; its own router and predictor, and everything else, count
  /// whole.
  std::int64_t active = 0;
  std::int64_t embedding = 0;  // the lookup table; 0 with tied embeddings, whose table is the head's matrix
};

ParameterCount count_parameters(const Config& config);

/// The rule of thumb 6 N a training token, with N = active parameters without the embedding table.
double six_n_flops_per_token(const Config& config);

/// What the one horizon given in the config comes to.
struct Horizon {
  std::int64_t steps = 0;   // the horizon divided by a step, rounded to the nearest, at least 1
  std::int64_t tokens = 0;  // of those steps
  double flops = 0;         // of those steps
};

/// Throws UsageError when the horizon asks for more than 1e12 steps or 1e18 tokens.
Horizon plan_horizon(const Config& config);

/// An estimate of the bytes that training takes in the config's precision, by what they are for.
struct MemoryEstimate {
  double parameters = 0;
  double gradients = 0;
  double optimizer = 0;  // AdamW's two moments
  double activations =
      0;  // of one micro-batch: what is kept, and of the backward's own what exceeds the logits
  double logits_chunk = 0;  // the head and its loss work on a chunk of the tokens at a time
  // On a GPU alone. A machine's memory is not held as strictly, and its ops take little.
  double workspace = 0;   // of the ops' own, beside all tensors
  double evaluation = 0;  // of a batch, beside what a step keeps for the next one; 0: nothing is evaluated

  /// Of training steps: what fathom bench train measures.
  double steps() const { return parameters + gradients + optimizer + activations + logits_chunk + workspace; }
  double total() const { return steps() + evaluation; }
};

/// What is to train.
struct TrainingDevice {
  std::int64_t head_chunk_rows = 0;  // Backend::head_chunk_rows
  bool gpu = false;
};

MemoryEstimate estimate_memory(const Config& config, const TrainingDevice& device);
/// Of the device that the config names, a GPU for bf16.
MemoryEstimate estimate_memory(const Config& config);

}  // namespace fathom
