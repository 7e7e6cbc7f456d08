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

/// 16 bytes that nothing reads again soon: they are the first to leave the L2 cache.
__device__ __forceinline__ uint4 load_once_raw(const void* from) {
  return __ldcs(static_cast<const uint4*>(from));
}
__device__ __forceinline__ void store_once_raw(void* to, const uint4& raw) {
  __stcs(static_cast<uint4*>(to), raw);
}

/// `N` elements as floats. `from` must be aligned to the pack.
template <typename T, int N = kPack<T>>
struct Pack {
  float v[N];

  __device__ __forceinline__ static Pack load(const T* from) {
    const Raw raw = *reinterpret_cast<const Raw*>(from);  // a reference would be read an element at a time
    return of(raw);
  }
  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<Raw*>(to) = raw(); }

  /// The same of what nothing reads again soon.
  __device__ __forceinline__ static Pack load_once(const T* from) {
    if constexpr (sizeof(Raw) == sizeof(uint4)) {
      const uint4 bits = load_once_raw(from);
      return of(*reinterpret_cast<const Raw*>(&bits));
    } else {
      return load(from);
    }
  }
  __device__ __forceinline__ void store_once(T* to) const {
    if constexpr (sizeof(Raw) == sizeof(uint4)) {
      const Raw bits = raw();
      store_once_raw(to, *reinterpret_cast<const uint4*>(&bits));
    } else {
      store(to);
    }
  }

 private:
  struct alignas(sizeof(T) * N) Raw {
    T e[N];
  };
  __device__ __forceinline__ static Pack of(const Raw& raw) {
    Pack p;
#pragma unroll
    for (int i = 0; i < N; ++i) p.v[i] = to_float(raw.e[i]);
    return p;
  }
  __device__ __forceinline__ Raw raw() const {
    Raw raw;
#pragma unroll
    for (int i = 0; i < N; ++i) raw.e[i] = from_float<T>(v[i]);
    return raw;
  }
};

/// Whether rows of `width` elements of T can be read pack by pack from `data` (its rows then are aligned
/// too).
template <typename T>
__host__ __device__ __forceinline__ bool packs(const void* data, std::int64_t width) {
  return width % kPack<T> == 0 && reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
}

}  // namespace fathom::cuda
