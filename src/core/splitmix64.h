// SplitMix64 (Steele et al. 2014): a good mixing of 64 bits, and the generator that it makes of a counter.
// The same numbers everywhere, which the standard library's distributions do not promise.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fathom {

/// The counter's stride: 2^64 over the golden ratio.
inline constexpr std::uint64_t kGoldenGamma = 0x9E3779B97F4A7C15U;

/// The finaliser: a bijection in which every bit of `x` decides every bit of the result.
constexpr std::uint64_t mix64(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
  return x ^ (x >> 31);
}

class SplitMix64 {
 public:
  explicit constexpr SplitMix64(std::uint64_t seed) : state_(seed) {}
  constexpr std::uint64_t next() { return mix64(state_ += kGoldenGamma); }
  /// In [0, n), for an n far below 2^64.
  constexpr std::size_t below(std::size_t n) { return static_cast<std::size_t>(next() % n); }

 private:
  std::uint64_t state_;
};

}  // namespace fathom
