// Codes of keys and values (kernels/cache_codes.h): where they lie in a block, one head of one entry to codes
// by a warp, and codes to numbers.
#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/cache_codes.h"
#include "kernels/cuda/cached_attention.h"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

/// x' = low + step * code
struct CodeScale {
  float step, low;

  __device__ __forceinline__ static CodeScale of(std::uint32_t word) { return {low_of(word), high_of(word)}; }
  __device__ __forceinline__ std::uint32_t word() const {
    return __float_as_uint(step) >> 16 | (__float_as_uint(low) & 0xffff0000U);
  }
  /// The product is exact: fused or not, it is the same.
  __device__ __forceinline__ float number(unsigned code) const {
    return __fmaf_rn(step, static_cast<float>(code), low);
  }
  /// Of a step of 0, and of one that is NaN, the code 0.
  __device__ __forceinline__ unsigned code(float x, float levels) const {
    float v = __fdiv_rn(__fsub_rn(x, low), step);
    v = v > 0 ? v : 0;
    v = v < levels ? v : levels;
    return __float2uint_rn(v);
  }
};

/// The codes of one block.
template <int kBits>
struct CodeBlock {
  static_assert(kBits == 4 || kBits == 8);
  std::uint8_t* data;
  int block, kv_heads, bytes;  // of one head of one entry

  __device__ __forceinline__ static CodeBlock at(std::uint8_t* pool, const CacheShape& s,
                                                 std::int64_t number) {
    const int bytes = static_cast<int>(cache_code_bytes(s.head_dim, kBits));
    const std::int64_t size = 2 * s.kv_heads * s.block * (bytes + kCacheScaleBytes);
    return {pool + number * size, static_cast<int>(s.block), static_cast<int>(s.kv_heads), bytes};
  }
  /// head: of the keys; the values' are `kv_heads` behind.
  __device__ __forceinline__ std::uint8_t* codes(int head, int inside) const {
    return data + (head * block + inside) * bytes;
  }
  __device__ __forceinline__ std::uint32_t* scales(int head, int inside) const {
    return reinterpret_cast<std::uint32_t*>(data + 2 * kv_heads * block * bytes) + head * block + inside;
  }
};

template <int kBits>
__device__ __forceinline__ unsigned code_at(const std::uint8_t* codes, int e) {
  if constexpr (kBits == 8) {
    return codes[e];
  } else {
    return codes[e / 2] >> (e % 2 * 4) & 15U;
  }
}

/// As bf16, towards minus infinity, and finite.
__device__ __forceinline__ float bf16_below(float x) {
  const std::uint32_t bits = __float_as_uint(x), cut = bits & 0xffff0000U;
  const bool next = cut != bits && bits >> 31 != 0 && cut != 0xff7f0000U;
  return __uint_as_float(next ? cut + 0x10000U : cut);
}
/// As bf16, away from zero. x >= 0
__device__ __forceinline__ float bf16_above(float x) {
  const std::uint32_t bits = __float_as_uint(x), cut = bits & 0xffff0000U;
  return __uint_as_float(cut == bits ? cut : cut + 0x10000U);
}

/// The elements of a head as they become codes: of a key without their mean, where there is one.
template <typename T>
struct HeadToCode {
  const T* x;
  const float* mean = nullptr;  // null: none

  __device__ __forceinline__ float operator()(int e) const {
    const float v = to_float(x[e]);
    return mean != nullptr ? __fsub_rn(v, __ldg(mean + e)) : v;
  }
};

/// The scale of d elements x(0), x(1), ..., by a whole warp.
template <typename T>
__device__ __forceinline__ CodeScale code_scale(const HeadToCode<T>& x, int d, int bits) {
  float least = INFINITY, most = -INFINITY;
  bool strange = false;
  for (int e = static_cast<int>(threadIdx.x) % 32; e < d; e += 32) {
    const float v = x(e);
    least = fminf(least, v);
    most = fmaxf(most, v);
    strange = strange || !isfinite(v);
  }
  least = warp_reduce(least, Min{});
  most = warp_reduce(most, Max{});
  if (__any_sync(kFullWarp, strange)) return {NAN, 0};
  const float clip = cache_clip(bits), levels = static_cast<float>((1 << bits) - 1);
  const float middle = __fmaf_rn(most, 0.5F, __fmul_rn(0.5F, least)),
              spread = __fmaf_rn(most, 0.5F, -__fmul_rn(0.5F, least));
  const float low = bf16_below(__fmaf_rn(-clip, spread, middle));
  const float high = __fmaf_rn(clip, spread, middle);
  // Halves: the whole range may be no float.
  const float half = __fmaf_rn(high, 0.5F, -__fmul_rn(0.5F, low));
  return {half > 0 ? bf16_above(__fdiv_rn(half, 0.5F * levels)) : 0, low};
}

/// d elements to codes, by a whole warp. `see(e, code, scale)`: of each element, by one lane, which reads it
/// no more.
template <int kBits, typename T, typename See>
__device__ __forceinline__ void encode_head(std::uint8_t* codes, std::uint32_t* scale, const HeadToCode<T>& x,
                                            int d, See&& see) {
  constexpr float kLevels = (1 << kBits) - 1;
  const CodeScale s = code_scale(x, d, kBits);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) *scale = s.word();
  const auto code = [&](int e) {
    const unsigned of_element = s.code(x(e), kLevels);
    see(e, of_element, s);
    return of_element;
  };
  for (int b = lane; b < (d * kBits + 7) / 8; b += 32) {
    if constexpr (kBits == 8) {
      codes[b] = static_cast<std::uint8_t>(code(b));
    } else {
      const unsigned first = code(2 * b), second = 2 * b + 1 < d ? code(2 * b + 1) : 0;
      codes[b] = static_cast<std::uint8_t>(first | second << 4);
    }
  }
}
template <int kBits, typename T>
__device__ __forceinline__ void encode_head(std::uint8_t* codes, std::uint32_t* scale, const HeadToCode<T>& x,
                                            int d) {
  encode_head<kBits>(codes, scale, x, d, [](int, unsigned, const CodeScale&) {});
}

}  // namespace fathom::cuda
