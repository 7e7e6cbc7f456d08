// Vectors of the instruction set that this copy is compiled for, in the compiler's vector extension: the same
// source is SSE2 or NEON, AVX2 and AVX-512.
#pragma once

#include <cstdint>

namespace fathom::cpu::FATHOM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kColumnVectors = 4;  // of a register block: 6 x 4 accumulators of 32 registers
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kColumnVectors = 2;  // 6 x 2 accumulators of 16 registers
#else
constexpr int kVectorBytes = 16;
constexpr int kColumnVectors = 2;
#endif

template <typename T>
struct LaneIndex {
  using type = std::int32_t;
};
template <>
struct LaneIndex<double> {
  using type = std::int64_t;
};

template <typename T>
using Vec [[gnu::vector_size(kVectorBytes)]] = T;
template <typename T>
using IndexVec [[gnu::vector_size(kVectorBytes)]] = typename LaneIndex<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
[[gnu::always_inline]] inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
/// Twice kLanes<float> numbers of bf16 as floats, those at even places and those at odd ones: each pair is a
/// word, and a float's upper half is the number. (Widening them in order takes four times as many
/// instructions.)
struct Bf16Pairs {
  Vec<float> even, odd;
};
[[gnu::always_inline]] inline Bf16Pairs load_bf16_pairs(const std::uint16_t* p) {
  using Words [[gnu::vector_size(kVectorBytes)]] = std::uint32_t;
  Words words;
  __builtin_memcpy(&words, p, sizeof(words));
  const Words even = words << 16, odd = words & 0xffff0000U;
  Bf16Pairs pairs;
  __builtin_memcpy(&pairs.even, &even, sizeof(even));
  __builtin_memcpy(&pairs.odd, &odd, sizeof(odd));
  return pairs;
}
template <typename T>
[[gnu::always_inline]] inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}
template <typename T>
[[gnu::always_inline]] inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
template <typename T>
[[gnu::always_inline]] inline IndexVec<T> lane_numbers() {
  IndexVec<T> v;
  for (int l = 0; l < kLanes<T>; ++l) v[l] = l;
  return v;
}

/// The lanes' sum, halves added to halves.
template <typename T>
[[gnu::always_inline]] inline T sum_of_lanes(Vec<T> v) {
  constexpr int W = kLanes<T>;
  T lanes[W];
  store<T>(lanes, v);
#pragma GCC unroll 4
  for (int half = W / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

}  // namespace fathom::cpu::FATHOM_ISA
