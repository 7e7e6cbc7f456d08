// CudaBackend's attention: which kernels compute it.
#include "kernels/cuda/attention.h"

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/cudnn_attention.h"

namespace fathom::cuda {

namespace {

std::int64_t rows_of(const AttentionShape& s) { return s.batch * s.seq; }
std::int64_t qkv_size(const AttentionShape& s) {
  return rows_of(s) * (s.heads + 2 * s.kv_heads) * s.head_dim;
}
std::int64_t out_size(const AttentionShape& s) { return rows_of(s) * s.heads * s.head_dim; }

void check_shape(const char* op, const AttentionShape& s) {
  if (s.kv_heads < 1) fail(op, "kv_heads", s.kv_heads, 1);
  if (s.heads < 1) fail(op, "heads", s.heads, s.kv_heads);
  if (s.heads % s.kv_heads != 0) fail(op, "heads modulo kv_heads", s.heads % s.kv_heads, 0);
  if (s.head_dim < 1) fail(op, "head_dim", s.head_dim, 1);
}

/// Of one head-wise product, both ways the diagonal counts half. What document masks save is known to the
/// device alone, so they count as if they were not there.
double score_flops(const AttentionShape& s) {
  return 4.0 * static_cast<double>(s.heads * s.head_dim) * static_cast<double>(s.batch) *
         (static_cast<double>(s.seq) * static_cast<double>(s.seq) / 2);
}

/// cuDNN builds a plan for each shape, in up to a second, and keeps it. Lengths of training are round;
/// others, as of a prompt that grows by a token or of the tokens that a causal router keeps, come once, and
/// are our own kernels'.
bool worth_a_plan(const AttentionShape& s) { return s.seq % 64 == 0; }

/// Where our own backward beats cuDNN's: short sequences, of which a block holds a whole head. Forward cuDNN
/// is ahead everywhere (docs/results/gpu-speed.md); the log-sum-exp that it leaves is the same natural one.
bool prefers_flash_backward(const AttentionShape& s) { return short_flash_supports(s); }

}  // namespace

void CudaBackend::attention_forward(View out, View lse, ConstView qkv, ConstView first_key,
                                    const AttentionShape& s) {
  const char* op = "attention_forward";
  check_shape(op, s);
  flop_log.add("attention_scores", score_flops(s));
  for_compute_type(op, qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    AttentionForward<T> a;
    a.out = output<T>(op, "out", out, out_size(s));
    a.lse = output<float>(op, "lse", lse, rows_of(s) * s.heads);
    a.qkv = input<T>(op, "qkv", qkv, qkv_size(s));
    a.first_key = optional_input<std::int32_t>(op, "first_key", first_key, rows_of(s));
    a.shape = s;
    if (rows_of(s) == 0) return;
    if constexpr (std::is_same_v<T, bf16>) {
      const bool flash = flash_supports(s) && aligned(a.qkv) && aligned(a.out);
      const bool cudnn = a.first_key == nullptr && cudnn_ != nullptr && cudnn_->supports(s);
      if (!options_.invariant && cudnn && (worth_a_plan(s) || !flash)) {
        cudnn_->forward(a.out, a.lse, a.qkv, s, scratch(cudnn_->forward_workspace(s)));
        return;
      }
      if (!options_.invariant && flash) {
        attend_flash(a, stream_);
        return;
      }
    }
    attend_rows(a, stream_);
  });
}

void CudaBackend::attention_backward(View dqkv, ConstView dout, ConstView out, ConstView lse, ConstView qkv,
                                     ConstView first_key, const AttentionShape& s) {
  const char* op = "attention_backward";
  check_shape(op, s);
  flop_log.add("attention_scores", 2 * score_flops(s));
  for_compute_type(op, qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    AttentionBackward<T> a;
    a.dqkv = output<T>(op, "dqkv", dqkv, qkv_size(s));
    a.dout = input<T>(op, "dout", dout, out_size(s));
    a.out = input<T>(op, "out", out, out_size(s));
    a.lse = input<float>(op, "lse", lse, rows_of(s) * s.heads);
    a.qkv = input<T>(op, "qkv", qkv, qkv_size(s));
    a.first_key = optional_input<std::int32_t>(op, "first_key", first_key, rows_of(s));
    a.shape = s;
    if (rows_of(s) == 0) return;
    if constexpr (std::is_same_v<T, bf16>) {
      const bool flash =
          flash_supports(s) && aligned(a.qkv) && aligned(a.out) && aligned(a.dout) && aligned(a.dqkv);
      const bool cudnn = a.first_key == nullptr && cudnn_ != nullptr && cudnn_->supports(s);
      if (cudnn && !(flash && (prefers_flash_backward(s) || !worth_a_plan(s)))) {
        cudnn_->backward(a.dqkv, a.dout, a.out, a.lse, a.qkv, s, scratch(cudnn_->backward_workspace(s)));
        return;
      }
      if (flash && a.first_key == nullptr && short_flash_supports(s)) {
        attend_short_flash_backward(a, stream_);
        return;
      }
      a.delta = scratch_of<float>(rows_of(s) * s.heads);
      if (flash) {
        attend_flash_backward(a, stream_);
        return;
      }
    }
    if (a.delta == nullptr) a.delta = scratch_of<float>(rows_of(s) * s.heads);
    attend_rows_backward(a, stream_);
  });
}

void CudaBackend::first_keys(View first_key, ConstView documents, std::int64_t batch, std::int64_t seq) {
  const char* op = "first_keys";
  auto* first = output<std::int32_t>(op, "first_key", first_key, batch * seq);
  const auto* document = input<std::int32_t>(op, "documents", documents, batch * seq);
  first_keys_of(first, document, batch, seq, stream_);
}

}  // namespace fathom::cuda
