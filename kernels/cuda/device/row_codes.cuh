// A row's codes of few bits, by threads that have it in registers (Backend::quantize_rows). The largest
// magnitude is that of the floats' bits without their signs, in which what is not finite comes last.
//
// A division to the last bit costs as many instructions as all the rest, so codes come from a product with 1
// / scale, and from a division only where the product lies so near to the middle of two codes that the two
// could differ.
#pragma once

#include <cfloat>
#include <cstdint>

#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/row_packs.cuh"
#include "kernels/row_codes.h"

namespace fathom::cuda {

struct CodeRule {
  float clip_over_most = 0, least = 0;

  CodeRule() = default;
  explicit CodeRule(const RowQuantization& s)
      : clip_over_most(s.clip / static_cast<float>((1 << (s.bits - 1)) - 1)),
        least(-static_cast<float>(1 << (s.bits - 1))) {}
};

/// Where the codes go.
struct CodesOut {
  std::int8_t* codes;  // rows as PackedFormat has them
  float* scales;
  std::int64_t row_bytes;
  CodeRule rule;
};

/// The scale of a row whose largest magnitude has these bits.
struct RowScale {
  float scale, inverse, least;
  bool finite, exactly;  // exactly: 1 / scale is no normal number

  __device__ __forceinline__ RowScale(const CodeRule& rule, int bits) : least(rule.least) {
    constexpr int kInfinity = 0x7f800000;
    finite = bits < kInfinity;
    scale = fminf(__fmul_rn(__int_as_float(bits), rule.clip_over_most), FLT_MAX / -least);
    scale = scale > 0 ? scale : 1.0F;
    exactly = !(scale > 0x1p-100F && scale < 0x1p100F);
    inverse = exactly ? 0.0F : __fdiv_rn(1.0F, scale);
  }
  /// What products multiply by: NaN for a row that is not finite.
  __device__ __forceinline__ float stored() const { return finite ? scale : __int_as_float(0x7fc00000); }
  __device__ __forceinline__ float clamped(float code) const { return fminf(fmaxf(code, least), -least - 1); }
  __device__ __forceinline__ int exact_code(float x) const {
    return __float2int_rn(clamped(__fdiv_rn(x, scale)));
  }

  /// The codes of a pack, a byte each; zeros of a row that is not finite. With s = x / scale to the last bit,
  /// and t the product with 1 / scale, each of two roundings: |t - s| < 2^-22 |s|, and up to 129 that is
  /// below kUnsure, so that both have one nearest integer where t is farther than that from a middle. Beyond,
  /// both are clamped.
  template <int N>
  __device__ __forceinline__ void codes_of(unsigned (&words)[N / 4], const float (&v)[N]) const {
    constexpr float kNoFraction =
        0x1.8p23F;  // sums with it have none in fp32, and end with the integer's bits
    constexpr float kUnsure = 0x1p-14F;
    unsigned sums[N];
    float farthest = 0;  // from an integer
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float code = clamped(__fmul_rn(v[i], inverse));
      const float sum = __fadd_rn(code, kNoFraction);
      sums[i] = __float_as_uint(sum);
      farthest = fmaxf(farthest, fabsf(__fsub_rn(code, __fsub_rn(sum, kNoFraction))));
    }
    if (exactly || farthest > 0.5F - kUnsure) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        sums[i] = __float_as_uint(__fadd_rn(clamped(__fdiv_rn(v[i], scale)), kNoFraction));
    }
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const unsigned low = __byte_perm(sums[i], sums[i + 1], 0x0040);
      const unsigned high = __byte_perm(sums[i + 2], sums[i + 3], 0x0040);
      words[i / 4] = finite ? __byte_perm(low, high, 0x5410) : 0;
    }
  }
};

/// The largest of what the bits without signs are, of a pack.
__device__ __forceinline__ int largest_bits(const Pack<float>&, const uint4& raw, int so_far) {
  constexpr unsigned kMagnitude = 0x7fffffffU;
  const unsigned a = max(raw.x & kMagnitude, raw.y & kMagnitude);
  const unsigned b = max(raw.z & kMagnitude, raw.w & kMagnitude);
  return max(so_far, static_cast<int>(max(a, b)));
}
/// Of bf16 two at once, and as bf16: the upper half of the result is a float's.
__device__ __forceinline__ int largest_bits(const Pack<__nv_bfloat16>&, const uint4& raw, int so_far) {
  constexpr unsigned kMagnitude = 0x7fff7fffU;
  const unsigned a = __vmaxu2(raw.x & kMagnitude, raw.y & kMagnitude);
  const unsigned b = __vmaxu2(raw.z & kMagnitude, raw.w & kMagnitude);
  const unsigned most = __vmaxu2(a, b);
  return max(so_far, static_cast<int>(max(most << 16, most & 0xffff0000U)));
}

/// Of a block of kWarps warps. Every thread gets the result; once a kernel.
template <int kWarps>
__device__ __forceinline__ int largest_of_block(int x) {
  __shared__ int warps[kWarps];
  x = __reduce_max_sync(kFullWarp, x);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (const int of : warps) x = max(x, of);
  return x;
}

__device__ __forceinline__ void store_words(std::int8_t* to, const unsigned (&words)[1]) {
  *reinterpret_cast<unsigned*>(to) = words[0];
}
__device__ __forceinline__ void store_words(std::int8_t* to, const unsigned (&words)[2]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
}

}  // namespace fathom::cuda
