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

/// Four words of shared memory, behind the copies that were waited for and before those that are asked for
/// afterwards.
__device__ __forceinline__ uint4 take_words(unsigned from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

}  // namespace fathom::cuda
