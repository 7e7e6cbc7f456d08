// A dot product by one thread. Attention with and without a cache share it, and with it their bits.
#pragma once

#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

/// In the order of the elements, whether they are read by packs or not.
template <typename T>
__device__ __forceinline__ float dot(const float* x, const T* y, int n) {
  float sum = 0.0F;
  if (packs<T>(y, n)) {
    for (int e = 0; e < n; e += kPack<T>) {
      const Pack<T> p = Pack<T>::load(y + e);
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) sum = fmaf(x[e + i], p.v[i], sum);
    }
  } else {
    for (int e = 0; e < n; ++e) sum = fmaf(x[e], to_float(y[e]), sum);
  }
  return sum;
}

}  // namespace fathom::cuda
