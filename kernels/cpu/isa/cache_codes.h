// Codes of keys and values (kernels/cache_codes.h): one head of one entry to codes, and codes to numbers.
#pragma once

#include <cstdint>

#include "kernels/cache_codes.h"
#include "kernels/cpu/isa/simd.h"
#include "kernels/cpu/isa/vector_math.h"

namespace fathom::cpu::FATHOM_ISA {

/// x' = low + step * code
struct CodeScale {
  float step, low;
};

constexpr std::uint32_t kBf16Bits = 0xffff0000U;

/// As bf16, towards minus infinity, and finite.
inline float bf16_below(float x) {
  const std::uint32_t bits = bits_of(x), cut = bits & kBf16Bits;
  constexpr std::uint32_t kLeast = 0xff7f0000U;
  if (cut == bits || bits >> 31 == 0 || cut == kLeast) return float_of(cut);
  return float_of(cut + 0x10000U);
}
/// As bf16, away from zero. x >= 0
inline float bf16_above(float x) {
  const std::uint32_t bits = bits_of(x), cut = bits & kBf16Bits;
  return float_of(cut == bits ? cut : cut + 0x10000U);
}

[[gnu::always_inline]] inline std::uint32_t word_of(const CodeScale& s) {
  return bits_of(s.step) >> 16 | (bits_of(s.low) & kBf16Bits);
}
[[gnu::always_inline]] inline CodeScale scale_of(std::uint32_t word) {
  return {float_of(word << 16), float_of(word & kBf16Bits)};
}

/// The products are fused by name: a compiler that chose would give each instruction set bits of its own.
template <typename T>
CodeScale code_scale(const T* x, std::int64_t d, int bits) {
  float least = static_cast<float>(x[0]), most = least, strange = 0;
  for (std::int64_t e = 0; e < d; ++e) {
    const float v = static_cast<float>(x[e]);
    least = v < least ? v : least;
    most = v > most ? v : most;
    strange += v - v;  // 0, or NaN
  }
  if (strange != 0) return {__builtin_nanf(""), 0};
  const float clip = cache_clip(bits), levels = static_cast<float>((1 << bits) - 1);
  const float middle = __builtin_fmaf(most, 0.5F, 0.5F * least),
              spread = __builtin_fmaf(most, 0.5F, -(0.5F * least));
  const float low = bf16_below(__builtin_fmaf(-clip, spread, middle));
  const float high = __builtin_fmaf(clip, spread, middle);
  // Halves: the whole range may be no float.
  const float half = __builtin_fmaf(high, 0.5F, -(0.5F * low));
  return {half > 0 ? bf16_above(half / (0.5F * levels)) : 0, low};
}

/// Of a step of 0, and of one that is NaN, the code 0.
[[gnu::always_inline]] inline std::uint8_t code_of(float x, const CodeScale& s, float levels) {
  constexpr float kNoFraction = 0x1.8p23F;
  float v = (x - s.low) / s.step;
  v = v > 0 ? v : 0;
  v = v < levels ? v : levels;
  return static_cast<std::uint8_t>(v + kNoFraction - kNoFraction);
}

[[gnu::always_inline]] inline float number_of(std::uint8_t code, const CodeScale& s) {
  return s.low + s.step * static_cast<float>(code);
}

/// As many codes as a vector of T has lanes.
template <typename T>
constexpr int kCodeLanes = kLanes<T>;
template <typename T>
using CodeVec [[gnu::vector_size(kCodeLanes<T> * sizeof(std::int32_t))]] = std::int32_t;

/// By way of memory, which compilers make one widening instruction of; of a conversion of vectors they make
/// one for each lane.
template <typename T>
[[gnu::always_inline]] inline CodeVec<T> load_codes(const std::uint8_t* p) {
  std::int32_t lanes[kCodeLanes<T>];
  for (int l = 0; l < kCodeLanes<T>; ++l) lanes[l] = p[l];
  CodeVec<T> codes;
  __builtin_memcpy(&codes, lanes, sizeof(codes));
  return codes;
}

/// The scales of the lanes, and what codes then stand for: rounded to float first, for double too.
template <typename T>
struct ScaleVec {
  using Floats [[gnu::vector_size(kCodeLanes<T> * sizeof(float))]] = float;
  Floats step, low;

  explicit ScaleVec(const CodeScale& s) : step(s.step - Floats{}), low(s.low - Floats{}) {}
  explicit ScaleVec(const std::uint32_t* words) {
    using Words [[gnu::vector_size(kCodeLanes<T> * sizeof(std::uint32_t))]] = std::uint32_t;
    Words w;
    __builtin_memcpy(&w, words, sizeof(w));
    const Words steps = w << 16, lows = w & kBf16Bits;
    __builtin_memcpy(&step, &steps, sizeof(step));
    __builtin_memcpy(&low, &lows, sizeof(low));
  }
  [[gnu::always_inline]] Vec<T> numbers(const CodeVec<T>& codes) const {
    const Floats x = low + step * __builtin_convertvector(codes, Floats);
    return __builtin_convertvector(x, Vec<T>);
  }
};

/// codes[d], one a byte.
template <typename T>
CodeScale encode_head(std::uint8_t* codes, const T* x, std::int64_t d, int bits) {
  const CodeScale s = code_scale(x, d, bits);
  const float levels = static_cast<float>((1 << bits) - 1);
  for (std::int64_t e = 0; e < d; ++e) codes[e] = code_of(static_cast<float>(x[e]), s, levels);
  return s;
}

}  // namespace fathom::cpu::FATHOM_ISA
