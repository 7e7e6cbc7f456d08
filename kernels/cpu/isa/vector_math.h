// Elementary functions that the compiler can vectorise: branch-free polynomials in float, the C library in
// double.
//
// The coefficients are minimax fits of our own (Lawson's iteration on Chebyshev nodes) of the stated
// remainder. In float the relative error is below 2e-7, NaN gives NaN, and the infinities give the limits.
// exp flushes results below the smallest normal number to 0.
#pragma once

#include <cstdint>

#include <math.h>

namespace fathom::cpu::FATHOM_ISA {

// A define, because the attribute has no other short name.
#define FATHOM_INLINE inline __attribute__((always_inline))

FATHOM_INLINE std::uint32_t bits_of(float x) { return __builtin_bit_cast(std::uint32_t, x); }
FATHOM_INLINE std::uint64_t bits_of(double x) { return __builtin_bit_cast(std::uint64_t, x); }
FATHOM_INLINE float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }

constexpr float kLn2High = 0x1.62ep-1F;  // 12 bits, so that its product with an exponent is exact
constexpr float kLn2Low = 3.194618329871446e-05F;

FATHOM_INLINE float vexp(float x) {
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const float shifted = x * 1.44269504088896341F + kRound;
  const float n = shifted - kRound;
  float r = x - n * kLn2High;
  r = r - n * kLn2Low;
  float q = 0.0013814608100801706F;  // e^r = 1 + r + r^2 q(r), |r| <= ln(2)/2
  q = q * r + 0.008368710987269878F;
  q = q * r + 0.04166838899254799F;
  q = q * r + 0.1666652113199234F;
  q = q * r + 0.4999999403953552F;
  const float p = (q * r) * r + r + 1.0F;
  // 2^n goes straight into the exponent of p. Outside the normal range the bits are garbage and replaced.
  const float scaled = float_of(bits_of(p) + (bits_of(shifted) << 23));
  const float flushed = x < -87.3365402F ? 0.0F : scaled;
  return x <= 88.7228317F ? flushed : x * 3.4e38F;  // above: infinity; NaN stays
}
FATHOM_INLINE double vexp(double x) { return ::exp(x); }

/// log of a normal number; 0 and subnormal numbers give -infinity, negative ones NaN.
FATHOM_INLINE float vlog(float x) {
  constexpr std::uint32_t kSqrtHalf = 0x3f3504f3U;
  const std::uint32_t offset = bits_of(x) - kSqrtHalf;
  const auto exponent = static_cast<std::int32_t>(offset) >> 23;
  const float f = float_of((offset & 0x007fffffU) + kSqrtHalf) - 1.0F;
  const auto n = static_cast<float>(exponent);
  float q = 0.06747692078351974F;  // log(1 + f) = f - f^2/2 + f^3 q(f)
  q = q * f - 0.11677505075931549F;
  q = q * f + 0.11888708919286728F;
  q = q * f - 0.12405342608690262F;
  q = q * f + 0.14219450950622559F;
  q = q * f - 0.16668005287647247F;
  q = q * f + 0.20002123713493347F;
  q = q * f - 0.25000008940696716F;
  q = q * f + 0.3333331346511841F;
  const float square = f * f;
  const float tail = (f * square) * q + n * kLn2Low - 0.5F * square;
  const float normal = n * kLn2High + (f + tail);
  const float small = x >= 0.0F ? -__builtin_inff() : __builtin_nanf("");
  const float bounded = x < 1.17549435e-38F ? small : normal;
  return x <= 3.40282347e38F ? bounded : x + x;  // infinity and NaN stay
}
FATHOM_INLINE double vlog(double x) { return ::log(x); }

/// log(1 + x) for 0 <= x, without the loss of x's low bits in 1 + x.
FATHOM_INLINE float vlog1p(float x) {
  const float sum = 1.0F + x;
  const float lost = x - (sum - 1.0F);
  return vlog(sum) + (x <= 3.40282347e38F ? lost / sum : 0.0F);
}
FATHOM_INLINE double vlog1p(double x) { return ::log1p(x); }

FATHOM_INLINE float vsigmoid(float x) { return 1.0F / (1.0F + vexp(-x)); }
FATHOM_INLINE double vsigmoid(double x) { return 1.0 / (1.0 + ::exp(-x)); }

FATHOM_INLINE float vtanh(float x) {
  const float a = __builtin_fabsf(x);
  const float z = x * x;
  float q = -0.005679303780198097F;  // tanh(x) = x + x^3 q(x^2), |x| < 0.625
  q = q * z + 0.020618122071027756F;
  q = q * z - 0.05373400077223778F;
  q = q * z + 0.1333138346672058F;
  q = q * z - 0.3333328068256378F;
  const float small = x + (x * z) * q;
  const float large = __builtin_copysignf(1.0F - 2.0F / (vexp(a + a) + 1.0F), x);
  return a < 0.625F ? small : large;  // NaN: the comparison fails, and `large` is NaN
}
FATHOM_INLINE double vtanh(double x) { return ::tanh(x); }

/// log(1 + e^x), stable at both ends.
template <typename T>
FATHOM_INLINE T vsoftplus(T x) {
  const T positive = x < T(0) ? T(0) : x;
  const T magnitude = x < T(0) ? -x : x;
  return positive + vlog1p(vexp(-magnitude));
}

FATHOM_INLINE float vsqrt(float x) { return __builtin_sqrtf(x); }
FATHOM_INLINE double vsqrt(double x) { return __builtin_sqrt(x); }

}  // namespace fathom::cpu::FATHOM_ISA
