// The softmax of FlashAttention (Dao et al. 2022; Dao 2023): 16 queries of one warp, whose keys come in
// pieces of 16.
#pragma once

#include <cstdint>

#include "kernels/cuda/device/flash_tile.cuh"

namespace fathom::cuda {

inline constexpr float kLog2E = 1.4426950408889634F;

/// Which keys the two query rows of a lane see: first[h] .. last[h], as indices within the sequence.
struct VisibleKeys {
  int first[2];
  int last[2];

  __device__ __forceinline__ bool operator()(int half, int key) const {
    return key >= first[half] && key <= last[half];
  }
};

/// A lane holds parts of the rows g and g + 8, in the layouts of mma.cuh.
template <int D>
struct QueryRows {
  std::uint32_t q[D / 16][4];
  float out[D / 8][4];
  float max[2];  // of the scores before the scale
  float sum[2];  // of this lane's columns only, until finish()

  __device__ __forceinline__ void begin(const HeadRows& queries, int row) {
    load_a_rows<D>(q, queries, row);
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[n][i] = 0.0F;
    }
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.0F;
  }

  /// Sees the 16 * kPieces keys that lie in the tiles from row 0 on; the first has index `key` in the
  /// sequence.
  template <int kPieces>
  __device__ __forceinline__ void see(SharedTile<D> keys, SharedTile<D> values, int key, bool masked,
                                      const VisibleKeys& visible, float scale_log2) {
    float s[2 * kPieces][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        std::uint32_t b[4];
        load_b(b, keys, 16 * p, 2 * k);
        mma(s[2 * p], q[k], b[0], b[1]);
        mma(s[2 * p + 1], q[k], b[2], b[3]);
      }
    }
    if (masked) {
      const int column = key + lane_id() % 4 * 2;
#pragma unroll
      for (int n = 0; n < 2 * kPieces; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (!visible(i / 2, column + 8 * n + i % 2)) s[n][i] = -INFINITY;
        }
      }
    }
    softmax<kPieces>(s, scale_log2);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const std::uint32_t a[4] = {pack_bf16(s[2 * p][0], s[2 * p][1]), pack_bf16(s[2 * p][2], s[2 * p][3]),
                                  pack_bf16(s[2 * p + 1][0], s[2 * p + 1][1]),
                                  pack_bf16(s[2 * p + 1][2], s[2 * p + 1][3])};
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        std::uint32_t b[4];
        load_b_rows(b, values, 16 * p, 2 * n);
        mma(out[2 * n], a, b[0], b[1]);
        mma(out[2 * n + 1], a, b[2], b[3]);
      }
    }
  }

  /// Writes the rows and their log-sum-exp; `lse` is the head's, from its sequence's start.
  __device__ __forceinline__ void finish(const HeadOutput& to, float* lse, int row, float scale) {
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = sum[half];
      total += __shfl_xor_sync(kFullWarp, total, 1);
      total += __shfl_xor_sync(kFullWarp, total, 2);
      factor[half] = total > 0.0F ? 1.0F / total : 0.0F;
      const int at = row + lane_id() / 4 + 8 * half;
      if (lane_id() % 4 == 0 && at < to.rows) lse[at] = max[half] * scale + logf(total);
    }
    store_rows<D>(to, row, out, factor[0], factor[1]);
  }

 private:
  /// Scores to probabilities relative to the greatest score so far; what was summed up follows.
  template <int kPieces>
  __device__ __forceinline__ void softmax(float (&s)[2 * kPieces][4], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = max[half];
#pragma unroll
      for (int n = 0; n < 2 * kPieces; ++n) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
      // A row that has seen no key yet: every term is exp(-inf - 0) = 0, not a NaN.
      const float base = most == -INFINITY ? 0.0F : most * scale_log2;
      const float correction = fast_exp2(max[half] * scale_log2 - base);
      max[half] = most;
      float part = 0.0F;
#pragma unroll
      for (int n = 0; n < 2 * kPieces; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = fast_exp2(s[n][i] * scale_log2 - base);
          part += s[n][i];
        }
      }
      sum[half] = sum[half] * correction + part;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        out[n][2 * half] *= correction;
        out[n][2 * half + 1] *= correction;
      }
    }
  }
};

}  // namespace fathom::cuda
