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
/// Numbers of bf16 as floats: the upper halves of their words.
[[gnu::always_inline]] inline Vec<float> load_bf16(const std::uint16_t* p) {
  using Halves [[gnu::vector_size(kVectorBytes / 2)]] = std::uint16_t;
  using Words [[gnu::vector_size(kVectorBytes)]] = std::uint32_t;
  Halves halves;
  __builtin_memcpy(&halves, p, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Vec<float> v;
  __builtin_memcpy(&v, &words, sizeof(v));
  return v;
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

}  // namespace fathom::cpu::FATHOM_ISA
