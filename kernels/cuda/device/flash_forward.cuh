// The softmax of FlashAttention (Dao et al. 2022; Dao 2023): 16 queries of one warp, whose keys come in
// pieces of 16.
#pragma once

#include <cstdint>

#include "kernels/cuda/device/flash_tile.cuh"

namespace fathom::cuda {

/// Which keys the two query rows of a lane see: first[h] .. last[h], as indices within the sequence.
struct VisibleKeys {
  int first[2];
  int last[2];

  __device__ __forceinline__ bool operator()(int half, int key) const {
    return key >= first[half] && key <= last[half];
  }
};

/// 16 * kTiles queries of one warp. A lane holds parts of the rows g and g + 8 of each tile of 16, in the
/// layouts of mma.cuh. With two tiles every key and value that is read from shared memory serves twice.
template <int D, int kTiles = 1>
struct QueryRows {
  std::uint32_t q[kTiles][D / 16][4];
  float out[kTiles][D / 8][4];
  float max[kTiles][2];  // of the scores before the scale
  float sum[kTiles][2];  // of this lane's columns only, until finish()

  __device__ __forceinline__ void begin(const HeadRows& queries, int row) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) load_a_rows<D>(q[t], queries, row + 16 * t);
    begin();
  }
  /// The same, with the queries there.
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[t][n][i] = 0.0F;
      }
      max[t][0] = max[t][1] = -INFINITY;
      sum[t][0] = sum[t][1] = 0.0F;
    }
  }

  /// Sees the 16 * kPieces keys that lie in the tiles from row 0 on; the first has index `key` in the
  /// sequence. `visible` is of each tile.
  template <int kPieces>
  __device__ __forceinline__ void see(SharedTile<D> keys, SharedTile<D> values, int key, bool masked,
                                      const VisibleKeys (&visible)[kTiles], float scale_log2) {
    float s[kTiles][2 * kPieces][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        std::uint32_t b[4];
        load_b(b, keys, 16 * p, 2 * k);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          mma(s[t][2 * p], q[t][k], b[0], b[1]);
          mma(s[t][2 * p + 1], q[t][k], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      if (masked) {
        const int column = key + lane_id() % 4 * 2;
#pragma unroll
        for (int n = 0; n < 2 * kPieces; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!visible[t](i / 2, column + 8 * n + i % 2)) s[t][n][i] = -INFINITY;
          }
        }
      }
      softmax<kPieces>(t, s[t], scale_log2);
    }
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      std::uint32_t a[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float(&pair)[4] = s[t][2 * p + i / 2];
          a[t][i] = pack_bf16(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < D / 16; ++n) {
        std::uint32_t b[4];
        load_b_rows(b, values, 16 * p, 2 * n);
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          mma(out[t][2 * n], a[t], b[0], b[1]);
          mma(out[t][2 * n + 1], a[t], b[2], b[3]);
        }
      }
    }
  }

  /// Writes the rows and their log-sum-exp; `lse` is the head's, from its sequence's start, or null: nobody
  /// wants it.
  __device__ __forceinline__ void finish(const HeadOutput& to, float* lse, int row, float scale) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum[t][half];
        total += __shfl_xor_sync(kFullWarp, total, 1);
        total += __shfl_xor_sync(kFullWarp, total, 2);
        factor[half] = total > 0.0F ? 1.0F / total : 0.0F;
        const int at = row + 16 * t + lane_id() / 4 + 8 * half;
        if (lse != nullptr && lane_id() % 4 == 0 && at < to.rows)
          lse[at] = max[t][half] * scale + logf(total);
      }
      store_rows<D>(to, row + 16 * t, out[t], factor[0], factor[1]);
    }
  }

 private:
  /// Scores of tile t to probabilities relative to the greatest score so far; what was summed up follows.
  template <int kPieces>
  __device__ __forceinline__ void softmax(int t, float (&s)[2 * kPieces][4], float scale_log2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = max[t][half];
#pragma unroll
      for (int n = 0; n < 2 * kPieces; ++n) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 1));
      most = fmaxf(most, __shfl_xor_sync(kFullWarp, most, 2));
      // A row that has seen no key yet: every term is exp(-inf - 0) = 0, not a NaN.
      const float base = most == -INFINITY ? 0.0F : most * scale_log2;
      const float correction = fast_exp2(max[t][half] * scale_log2 - base);
      max[t][half] = most;
      float part = 0.0F;
#pragma unroll
      for (int n = 0; n < 2 * kPieces; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          s[n][i] = fast_exp2(s[n][i] * scale_log2 - base);
          part += s[n][i];
        }
      }
      sum[t][half] = sum[t][half] * correction + part;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        out[t][n][2 * half] *= correction;
        out[t][n][2 * half + 1] *= correction;
      }
    }
  }
};

}  // namespace fathom::cuda
