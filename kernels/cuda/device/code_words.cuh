// Words of a cache of codes on their way to a thread (code_walk.cuh): straight into registers, or through its
// own 16 bytes in shared memory.
//
// Loads into registers are waited for by a counter, of which a warp has six; those of a loop share one, so a
// warp that wants the first of them waits for the last. Copies to shared memory are waited for in their
// order.
#pragma once

#include <cstdint>

#include "kernels/cuda/device/entry_walk.cuh"
#include "kernels/cuda/device/mma.cuh"

namespace fathom::cuda {

/// Neighbouring words, which nothing reads again soon.
template <int kWords>
__device__ __forceinline__ void load_words(std::uint32_t (&w)[kWords], const void* from) {
  if constexpr (kWords == 1) {
    w[0] = __ldcs(static_cast<const std::uint32_t*>(from));
  } else if constexpr (kWords == 2) {
    const uint2 v = __ldcs(static_cast<const uint2*>(from));
    w[0] = v.x, w[1] = v.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 v = load_once(static_cast<const uint4*>(from) + i);
      w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
  }
}

/// 1, 2 or 4 neighbouring words to shared memory, in the background.
template <int kWords>
__device__ __forceinline__ void copy_words(unsigned to, const void* from) {
  if constexpr (kWords == 4) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;\n" ::"r"(to), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;\n" ::"r"(to), "l"(from), "n"(4 * kWords)
                 : "memory");
  }
}

/// Pairs of codes as bf16: bits of both halves of a word that has them where bf16 wants them.
template <std::uint32_t kBits>
__device__ __forceinline__ std::uint32_t of_both_halves(std::uint32_t w) {
  return w & (kBits << 16 | kBits);
}
/// Bytes 2n and 2n + 1 of a word, likewise.
template <int kNumber>
__device__ __forceinline__ std::uint32_t two_bytes(std::uint32_t w) {
  return __byte_perm(w, 0, kNumber == 0 ? 0x4140 : 0x4342);
}

}  // namespace fathom::cuda
