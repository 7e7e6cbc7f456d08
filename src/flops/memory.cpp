// The memory estimate. It counts what the backward pass needs kept, element by element, and one block's
// gradients; of a GPU also what ops take for themselves, and an evaluation, which works beside the memory
// that a step keeps for the next one (train/step.h).
#include <algorithm>
#include <cmath>

#include "src/flops/flops.h"

namespace fathom {
namespace {

constexpr double kStatBytes = 4;  // fp32: masters, gradients, moments, statistics

double d(std::int64_t x) { return static_cast<double>(x); }

// Bytes of an element of the compute dtype. Training in bf16 is the GPU's.
double compute_bytes(const Config& c) { return c.train.precision == "bf16" ? 2 : 4; }

// Rows of an MLP for each token of a block that computes `tokens` of each sequence.
double mlp_rows_per_token(const Config& c, double tokens) {
  if (!c.routing.has_experts()) return 1;
  const auto whole = static_cast<std::int64_t>(tokens);
  return d(c.routing.experts.count) * d(expert_tokens(c.routing.experts, whole)) / tokens;
}

// Bytes that a block keeps for its backward pass, for each token that it computes. `mlp_rows`: of its
// experts, or 1.
double block_bytes_per_token(const Config& c, double mlp_rows) {
  const ModelConfig& m = c.model;
  const double heads = d(m.heads), kv_heads = d(m.kv_heads), head_dim = d(m.head_dim());
  const double qkv = (heads + 2 * kv_heads) * head_dim;
  const bool foretold = c.routing.experts_choose();
  const double elements =
      2 * d(m.width)                    // the outputs of both norms
      + qkv * (m.qk_norm ? 2 : 1)       // rotated in place, unless QK-norm reads them again
      + heads * head_dim                // attention's output
      + mlp_rows * 2 * d(m.ffn_hidden)  // gate, and the product of silu(gate) and up
      // experts: the norm's output, the rows that they take and what they make of them
      + (c.routing.has_experts() ? (1 + 2 * mlp_rows) * d(m.width) : 0) +
      (foretold && c.routing.has_predictor() ? 2 * d(c.routing.causal.predictor_hidden) : 0);
  // Log-sum-exps, norms' reciprocals; of experts affinities, slots and rows.
  const double statistics =
      heads + 2 + (m.qk_norm ? heads + kv_heads : 0) +
      (c.routing.has_experts() ? d(2 * c.routing.experts.count + c.routing.experts.noop) + 1 + mlp_rows : 0) +
      // What the choices are learned from: the logits of the router, of the predictor, or of both.
      (foretold ? (d(c.routing.has_aux_loss()) + d(c.routing.has_predictor())) *
                      d(c.routing.experts.count + c.routing.experts.noop)
                : 0);
  return compute_bytes(c) * elements + kStatBytes * statistics;
}

// Whether a block begins with two tensors, the stream and what is yet to be added to it: after a block of all
// tokens with experts.
bool comes_apart(const Config& c, std::int64_t layer) {
  return c.routing.has_experts() && layer > 0 && !c.routing.routes(layer) && !c.routing.routes(layer - 1);
}

// Bytes a token at the widest point of a block's backward pass: the gradient of SwiGLU's output, while those
// of gate and up take the place of what was kept, and the residual's gradient.
double backward_bytes_per_token(const Config& c, double mlp_rows) {
  const double rows_and_back = c.routing.has_experts() ? 2 * mlp_rows * d(c.model.width) : 0;
  return compute_bytes(c) * (mlp_rows * d(c.model.ffn_hidden) + 2 * d(c.model.width) + rows_and_back);
}

// Bytes that one layer's attention takes of the GPU's for its backward, when it computes `seq` tokens of each
// sequence.
double attention_workspace(const Config& c, double seq) {
  const ModelConfig& m = c.model;
  const double heads = d(m.heads), rows = d(c.micro_batch_sequences()) * seq;
  // cuDNN's, as measured (9.19): twice the queries in fp32, and as much of the row sums. Our own kernels',
  // which take what cuDNN does not: a row sum.
  const bool cudnn = c.train.precision == "bf16" && !c.data.document_mask && m.head_dim() <= 128;
  if (!cudnn) return kStatBytes * rows * heads;
  constexpr double kScores = 512 << 20;  // the deterministic one: bf16 scores, of a part of the batch
  const double scores = 2 * heads * seq * seq;
  const double parts = c.deterministic ? std::min(rows / seq * scores, std::max(kScores, scores)) : 0;
  return 2 * kStatBytes * rows * (heads * d(m.head_dim()) + heads) + parts;
}

// What the CUDA backend's ops take beside tensors: cuBLASLt's 32 MiB (kernels/cuda/gemm.h), and blocks that
// ops share, each larger than the one before and none given back (kernels/cuda/scratch.h).
double gpu_workspace(const Config& c) {
  constexpr double kProducts = 32 << 20, kFirstBlock = 64 << 20, kRoomToGrow = 1.25;
  const double rows = d(c.micro_batch_sequences()) * d(c.train.seq_len);
  // The embedding's backward: a sort of the tokens, and partial sums of every 16 rows.
  double most = 16 * rows + kStatBytes * rows / 8 * d(c.model.width);
  for (std::int64_t l = 0; l < c.model.depth; ++l) {
    const std::int64_t seq =
        c.routing.routes(l) ? kept_tokens(c.routing.capacity, c.train.seq_len) : c.train.seq_len;
    most = std::max(most, attention_workspace(c, d(seq)));
  }
  const double grown = kRoomToGrow * most;
  return kProducts + kFirstBlock + (grown > kFirstBlock ? grown : 0);
}

// The widest point of a forward pass that keeps nothing for a backward.
double evaluation_bytes(const Config& c, double logits_chunk) {
  if (c.data.valid.empty()) return 0;
  const double bytes = compute_bytes(c), width = d(c.model.width);
  const double tokens = d(c.micro_batch_sequences()) * d(c.train.seq_len);
  double most = 2 * bytes * tokens * width + logits_chunk;  // the head: the stream, and its norm
  double statistics = 0;
  for (std::int64_t l = 0; l < c.model.depth; ++l) {
    const bool routed = c.routing.routes(l);
    const double share =
        routed ? d(kept_tokens(c.routing.capacity, c.train.seq_len)) / d(c.train.seq_len) : 1.0;
    const double mlp_rows = mlp_rows_per_token(c, std::round(share * d(c.train.seq_len)));
    // The MLP: its input, that of the block, and what comes out, beside gate and up. Experts: their norm's
    // output, the rows that they take and what they make of them; and where the stream comes in two parts,
    // the second and the sum.
    double experts = c.routing.has_experts() ? (1 + 2 * mlp_rows) * width : 0;
    if (comes_apart(c, l)) experts += 2 * width;
    const double block = share * (3 * width + 2 * mlp_rows * d(c.model.ffn_hidden) + experts);
    most = std::max(most, bytes * tokens * (block + (routed ? width : 0)));
    if (c.routing.has_experts())  // affinities and slots, which all layers report
      statistics += kStatBytes * tokens * share *
                    (d(2 * c.routing.experts.count + c.routing.experts.noop) + 1 + mlp_rows);
  }
  return most + statistics;
}

// What the backends say, for a plan that opens none.
TrainingDevice usual_device(const Config& c) {
  const bool gpu = c.device.starts_with("cuda") || c.train.precision == "bf16";
  return {gpu ? 8192 : 512, gpu};
}

}  // namespace

MemoryEstimate estimate_memory(const Config& c) { return estimate_memory(c, usual_device(c)); }

MemoryEstimate estimate_memory(const Config& c, const TrainingDevice& device) {
  const ModelConfig& m = c.model;
  const double bytes = compute_bytes(c);
  const double parameters = d(count_parameters(c).total);
  const double tokens = d(c.micro_batch_sequences()) * d(c.train.seq_len);
  const double kept_share = d(kept_tokens(c.routing.capacity, c.train.seq_len)) / d(c.train.seq_len);
  const bool recomputes = c.train.recompute == Recompute::Block;

  double kept = 0, peak = 0;  // peak: while a block goes back, with what the blocks before it keep
  for (std::int64_t l = 0; l < m.depth; ++l) {
    const bool routed = c.routing.routes(l);
    const double share = routed ? kept_share : 1.0;
    const double mlp_rows = mlp_rows_per_token(c, std::round(share * d(c.train.seq_len)));
    const double per_token = block_bytes_per_token(c, mlp_rows);
    // A routed block also keeps its input, what it adds to the stream, the router's scalars and the
    // predictor. The stream that it leaves is the next block's input.
    double around = 0;
    if (routed) around += tokens * (bytes * d(m.width) * (1 + kept_share) + 2 * kStatBytes);
    if (routed && c.routing.has_predictor())
      around += tokens * bytes * 2 * d(c.routing.causal.predictor_hidden);
    const double block = per_token * tokens * share;
    const double inputs = comes_apart(c, l) ? 2 : 1;  // a recomputed block keeps what it begins with
    kept += around + (recomputes ? bytes * tokens * share * d(m.width) * inputs : block);
    peak = std::max(
        peak, kept + share * tokens * backward_bytes_per_token(c, mlp_rows) + (recomputes ? block : 0.0));
  }
  const double ends = 2 * bytes * tokens * d(m.width);  // the last norm's input, and the head's gradient

  MemoryEstimate e;
  e.parameters = (kStatBytes + (bytes == kStatBytes ? 0 : bytes)) * parameters;
  e.gradients = kStatBytes * parameters;
  e.optimizer = 2 * kStatBytes * parameters;
  e.logits_chunk = bytes * std::min(tokens, d(device.head_chunk_rows)) * d(m.vocab_size);
  // The chunks of logits are gone when the blocks go back.
  e.activations = ends + std::max(kept, peak - e.logits_chunk);
  if (device.gpu) {
    e.workspace = gpu_workspace(c);
    e.evaluation = evaluation_bytes(c, e.logits_chunk);
  }
  return e;
}

}  // namespace fathom
