// The gradients of FlashAttention. With P = exp(scale q k^T - lse), dP = dout v^T and dS = P * (dP - delta):
//   dv = P^T dout,  dk = scale dS^T q,  dq = scale dS k.
#pragma once

#include <cstdint>

#include "kernels/cuda/device/flash_forward.cuh"

namespace fathom::cuda {

/// What the queries of a shared tile need besides their rows. Queries beyond the sequence have lse2 = inf, so
/// that their probabilities are 0.
struct QueryStatistics {
  const float* lse2;  // lse * log2(e)
  const float* delta;
  const std::int32_t* first_key;  // null: none is masked by its document
};

/// dk (before the scale) and dv of 16 * kTiles keys, which one warp accumulates over queries.
template <int D, int kTiles>
struct KeyGradients {
  float dk[kTiles][D / 8][4];
  float dv[kTiles][D / 8][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dk[m][n][i] = dv[m][n][i] = 0.0F;
      }
    }
  }

  /// Adds what 16 queries give. `keys` and `values` begin at this warp's keys, of which the first has index
  /// `key`; `queries`, `douts` and the statistics begin at the 16 queries, the first with index `query`.
  /// ds[m] gets dS^T as A fragments: 16 keys x 16 queries.
  __device__ __forceinline__ void add(SharedTile<D> keys, SharedTile<D> values, int key,
                                      SharedTile<D> queries, SharedTile<D> douts, int query,
                                      const QueryStatistics& statistics, float scale_log2,
                                      std::uint32_t (&ds)[kTiles][4]) {
    const int g = lane_id() / 4, c2 = lane_id() % 4 * 2;
    float p[kTiles][2][4];
    product(p, keys, queries);
    // Masked where a query stands before a key, or where its document begins after the key.
    const bool diagonal = query < key + 16 * kTiles - 1;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 lse2 = *reinterpret_cast<const float2*>(statistics.lse2 + 8 * n + c2);
      int2 first = make_int2(0, 0);
      if (statistics.first_key != nullptr) {
        first = *reinterpret_cast<const int2*>(statistics.first_key + 8 * n + c2);
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int column = 8 * n + c2 + i % 2, row = 16 * m + g + i / 2 * 8;
          p[m][n][i] = fast_exp2(p[m][n][i] * scale_log2 - (i % 2 == 0 ? lse2.x : lse2.y));
          if (diagonal && query + column < key + row) p[m][n][i] = 0.0F;
          if (statistics.first_key != nullptr && key + row < (i % 2 == 0 ? first.x : first.y))
            p[m][n][i] = 0.0F;
        }
      }
    }
    accumulate(dv, p, douts, ds);
    float d[kTiles][2][4];
    product(d, values, douts);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const float2 delta = *reinterpret_cast<const float2*>(statistics.delta + 8 * n + c2);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d[m][n][i] = p[m][n][i] * (d[m][n][i] - (i % 2 == 0 ? delta.x : delta.y));
      }
    }
    accumulate(dk, d, queries, ds);
  }

  __device__ __forceinline__ void store(const HeadOutput& to_dk, const HeadOutput& to_dv, int key,
                                        float scale) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      store_rows<D>(to_dk, key + 16 * m, dk[m], scale, scale);
      store_rows<D>(to_dv, key + 16 * m, dv[m], 1.0F, 1.0F);
    }
  }

 private:
  /// c = rows columns^T: 16 * kTiles x 16.
  __device__ __forceinline__ static void product(float (&c)[kTiles][2][4], SharedTile<D> rows,
                                                 SharedTile<D> columns) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) c[m][n][i] = 0.0F;
      }
    }
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      std::uint32_t b[4];
      load_b(b, columns, 0, 2 * k);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        std::uint32_t a[4];
        load_a(a, rows, 16 * m, 2 * k);
        mma(c[m][0], a, b[0], b[1]);
        mma(c[m][1], a, b[2], b[3]);
      }
    }
  }
  /// sum += c rows, with c rounded to bf16; `a` keeps c's fragments.
  __device__ __forceinline__ static void accumulate(float (&sum)[kTiles][D / 8][4],
                                                    const float (&c)[kTiles][2][4], SharedTile<D> rows,
                                                    std::uint32_t (&a)[kTiles][4]) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      a[m][0] = pack_bf16(c[m][0][0], c[m][0][1]);
      a[m][1] = pack_bf16(c[m][0][2], c[m][0][3]);
      a[m][2] = pack_bf16(c[m][1][0], c[m][1][1]);
      a[m][3] = pack_bf16(c[m][1][2], c[m][1][3]);
    }
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
      std::uint32_t b[4];
      load_b_rows(b, rows, 0, 2 * n);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        mma(sum[m][2 * n], a[m], b[0], b[1]);
        mma(sum[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
};

}  // namespace fathom::cuda
