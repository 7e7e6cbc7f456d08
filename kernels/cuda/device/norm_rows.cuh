// RMSNorm's rows in registers: what the norm alone and the norm that ends with codes have in common, bits
// included.
#pragma once

#include "kernels/cuda/device/norm_weight.cuh"
#include "kernels/cuda/device/order.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/row_packs.cuh"

namespace fathom::cuda {

template <typename T>
struct NormRows {
  T* h;  // null: no addition
  T* y;
  float* rstd;
  const T* x;
  const T* a;  // null: no addition
  const float* w;
  std::int64_t rows;
  std::int64_t width;
  float eps;
};

/// A row of kWarps warps with kPacks packs a lane, in blocks of 128 threads. Reads x (and a), writes h where
/// it is wanted. With one warp a row some warps have none: their number is not below `rows`.
template <typename T, int kPacks, int kWarps>
struct NormedRow {
  static constexpr int kN = kPack<T>, kLanes = 32 * kWarps, kRows = 128 / kLanes;

  std::int64_t number;
  int lane, packs;
  float reciprocal;
  uint4 raw[kPacks];  // of x, or of h

  __device__ __forceinline__ explicit NormedRow(const NormRows<T>& p) {
    __shared__ float shared[32];
    lane = static_cast<int>(threadIdx.x) % kLanes;
    packs = static_cast<int>(p.width / kN);
    number = static_cast<std::int64_t>(last_part_first()) * kRows + static_cast<int>(threadIdx.x) / kLanes;
    if (number >= p.rows) return;
    const std::int64_t start = number * p.width;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int i = lane + k * kLanes;
      raw[k] = i < packs ? load_once_raw(p.x + start + i * kN) : uint4{};
    }
    if (p.a != nullptr) {
      uint4 other[kPacks];
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int i = lane + k * kLanes;
        other[k] = i < packs ? load_raw(p.a + start + i * kN) : uint4{};
      }
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int i = lane + k * kLanes;
        Pack<T> sum = unpack<T>(raw[k]);
        const Pack<T> addend = unpack<T>(other[k]);
#pragma unroll
        for (int e = 0; e < kN; ++e) sum.v[e] += addend.v[e];
        raw[k] = repack(sum);
        if (i < packs) store_once_raw(p.h + start + i * kN, raw[k]);
      }
    }
    float squares = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const Pack<T> values = unpack<T>(raw[k]);
#pragma unroll
      for (int e = 0; e < kN; ++e) squares += values.v[e] * values.v[e];
    }
    squares = kWarps == 1 ? warp_reduce(squares, Sum{}) : block_reduce(squares, Sum{}, shared);
    reciprocal = 1.0F / sqrtf(squares / static_cast<float>(p.width) + p.eps);
  }

  /// Pack k of the lane, which there is.
  __device__ __forceinline__ uint4 normed(const NormRows<T>& p, int k) const {
    float w[kN];
    load_floats(w, p.w + (lane + k * kLanes) * kN);
    Pack<T> values = unpack<T>(raw[k]);
#pragma unroll
    for (int e = 0; e < kN; ++e) values.v[e] = values.v[e] * reciprocal * held_weight(w[e]);
    return repack(values);
  }
};

}  // namespace fathom::cuda
