// Sixteen bytes at a time: packs of one dtype that compute as floats.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

namespace fathom::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// Elements of T in 16 bytes: 4 of fp32, 8 of bf16.
template <typename T>
inline constexpr int kPack = 16 / static_cast<int>(sizeof(T));

/// `N` elements as floats. `from` must be aligned to the pack.
template <typename T, int N = kPack<T>>
struct Pack {
  float v[N];

  __device__ __forceinline__ static Pack load(const T* from) {
    struct alignas(sizeof(T) * N) Raw {
      T e[N];
    };
    const Raw raw = *reinterpret_cast<const Raw*>(from);
    Pack p;
#pragma unroll
    for (int i = 0; i < N; ++i) p.v[i] = to_float(raw.e[i]);
    return p;
  }
  __device__ __forceinline__ void store(T* to) const {
    struct alignas(sizeof(T) * N) Raw {
      T e[N];
    };
    Raw raw;
#pragma unroll
    for (int i = 0; i < N; ++i) raw.e[i] = from_float<T>(v[i]);
    *reinterpret_cast<Raw*>(to) = raw;
  }
};

/// Whether rows of `width` elements of T can be read pack by pack from `data` (its rows then are aligned too).
template <typename T>
__host__ __device__ __forceinline__ bool packs(const void* data, std::int64_t width) {
  return width % kPack<T> == 0 && reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

}  // namespace fathom::cuda
