// The memory estimate. It counts what the backward pass needs kept, element by element, and one block's
// gradients.
#include <algorithm>

#include "src/flops/flops.h"

namespace fathom {
namespace {

constexpr double kBytes = 4;                // fp32
constexpr double kLogitsChunkTokens = 512;  // tokens whose logits exist at the same time

double d(std::int64_t x) { return static_cast<double>(x); }

// Elements that a block keeps for its backward pass, for each token that it computes.
double block_elements_per_token(const ModelConfig& m) {
  const double width = d(m.width), head_dim = d(m.head_dim()), heads = d(m.heads), kv_heads = d(m.kv_heads);
  const double attention =
      2 * width                                // the input and its norm
      + 2 * (heads + 2 * kv_heads) * head_dim  // queries, keys and values, before and after RoPE
      + heads * head_dim + heads;              // attention's output, and its log-sum-exp
  const double mlp =
      3 * width + 3 * d(m.ffn_hidden);  // x + a, its norm, the output; gate, up and their product
  return attention + mlp;
}

}  // namespace

MemoryEstimate estimate_memory(const Config& c) {
  const ModelConfig& m = c.model;
  const double parameters = d(count_parameters(c).total);
  const double tokens = d(c.micro_batch_sequences()) * d(c.train.seq_len);
  const double kept_share = d(kept_tokens(c.routing.capacity, c.train.seq_len)) / d(c.train.seq_len);
  const double per_token = block_elements_per_token(m);

  double kept = 0, largest = 0;
  for (std::int64_t l = 0; l < m.depth; ++l) {
    const bool routed = c.routing.routes(l);
    double block = per_token * tokens * (routed ? kept_share : 1.0);
    // A routed block also keeps the residual stream that it scatters into, the router's scalars and the
    // predictor.
    if (routed) block += tokens * (d(m.width) + 1);
    if (routed && c.routing.has_predictor()) block += tokens * 2 * d(c.routing.causal.predictor_hidden);
    kept += c.train.recompute == Recompute::Block ? tokens * d(m.width) : block;
    largest = std::max(largest, block);
  }
  // The backward pass holds one block's gradients, and with recomputation also that block's activations.
  kept += c.train.recompute == Recompute::Block ? 2 * largest : largest;
  kept += 3 * tokens * d(m.width);  // the embedding's output, the last norm, and the gradient between them

  MemoryEstimate e;
  e.parameters = kBytes * parameters;
  e.gradients = kBytes * parameters;
  e.optimizer = 2 * kBytes * parameters;
  e.activations = kBytes * kept;
  e.logits_chunk = kBytes * std::min(tokens, kLogitsChunkTokens) * d(m.vocab_size);
  return e;
}

}  // namespace fathom
