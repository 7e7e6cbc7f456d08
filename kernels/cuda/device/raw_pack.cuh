// A pack as it lies in memory: what a thread that has many loads in flight keeps in registers, converting at
// the use (vector.cuh's Pack converts at the load). Sixteen bytes are four registers, which an array of eight
// bf16 would not be.
#pragma once

#include <type_traits>

#include "kernels/cuda/device/row_packs.cuh"

namespace fathom::cuda {

template <typename T, int N = kPack<T>>
struct RawPack {
  static constexpr bool kWhole = sizeof(T) * N == sizeof(uint4);
  struct alignas(sizeof(T) * N) Elements {
    T e[N];
  };
  using Bits = std::conditional_t<kWhole, uint4, Elements>;

  Bits bits;

  __device__ __forceinline__ static RawPack load(const T* from) {
    return {*reinterpret_cast<const Bits*>(from)};
  }
  /// In one instruction: an assignment of 16 bytes inside a condition becomes four.
  __device__ __forceinline__ void store(T* to) const {
    if constexpr (kWhole) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(to)),
                   "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                   : "memory");
    } else {
      *reinterpret_cast<Bits*>(to) = bits;
    }
  }

  __device__ __forceinline__ Pack<T, N> values() const {
    if constexpr (kWhole) {
      return unpack<T>(bits);
    } else {
      Pack<T, N> p;
#pragma unroll
      for (int i = 0; i < N; ++i) p.v[i] = to_float(bits.e[i]);
      return p;
    }
  }
  __device__ __forceinline__ static RawPack of(const Pack<T, N>& p) {
    if constexpr (kWhole) {
      return {repack(p)};
    } else {
      RawPack raw;
#pragma unroll
      for (int i = 0; i < N; ++i) raw.bits.e[i] = from_float<T>(p.v[i]);
      return raw;
    }
  }
};

}  // namespace fathom::cuda
