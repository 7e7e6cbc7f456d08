// Where a head's rows lie in the packed projections.
#pragma once

#include "kernels/cuda/attention.h"
#include "kernels/cuda/device/flash_tile.cuh"

namespace fathom::cuda {

/// Head `head` of the H + 2G of a packed row (queries, then keys, then values), in sequence `b`.
__device__ __forceinline__ HeadRows packed_head(const bf16* qkv, const AttentionShape& s, int b, int head) {
  const std::int64_t stride = (s.heads + 2 * s.kv_heads) * s.head_dim;
  return {qkv + b * s.seq * stride + head * s.head_dim, stride, static_cast<int>(s.seq),
          static_cast<int>(s.head_dim)};
}
__device__ __forceinline__ HeadOutput packed_head(bf16* dqkv, const AttentionShape& s, int b, int head) {
  const HeadRows rows = packed_head(static_cast<const bf16*>(dqkv), s, b, head);
  return {const_cast<bf16*>(rows.data), rows.stride, rows.rows, rows.head_dim};
}
/// Head `head` of the H of a row of `out` or `dout`.
__device__ __forceinline__ HeadRows narrow_head(const bf16* out, const AttentionShape& s, int b, int head) {
  const std::int64_t stride = s.heads * s.head_dim;
  return {out + b * s.seq * stride + head * s.head_dim, stride, static_cast<int>(s.seq),
          static_cast<int>(s.head_dim)};
}
__device__ __forceinline__ HeadOutput narrow_head(bf16* out, const AttentionShape& s, int b, int head) {
  const HeadRows rows = narrow_head(static_cast<const bf16*>(out), s, b, head);
  return {const_cast<bf16*>(rows.data), rows.stride, rows.rows, rows.head_dim};
}

}  // namespace fathom::cuda
