// A pack as it lies in memory: what a thread that has many loads in flight keeps in registers, converting at
// the use (vector.cuh's Pack converts at the load).
#pragma once

#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

template <typename T, int N = kPack<T>>
struct alignas(sizeof(T) * N) RawPack {
  T e[N];

  __device__ __forceinline__ static RawPack load(const T* from) {
    return *reinterpret_cast<const RawPack*>(from);
  }
  __device__ __forceinline__ void store(T* to) const { *reinterpret_cast<RawPack*>(to) = *this; }
  __device__ __forceinline__ float get(int i) const { return to_float(e[i]); }
  __device__ __forceinline__ void set(int i, float x) { e[i] = from_float<T>(x); }
};

}  // namespace fathom::cuda
