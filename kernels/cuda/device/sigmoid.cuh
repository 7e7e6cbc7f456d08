// 1 / (1 + e^-x), exact and fast.
#pragma once

namespace fathom::cuda {

__device__ __forceinline__ float sigmoid(float x) { return 1.0F / (1.0F + expf(-x)); }

/// To a few units in the last place; 0 and 1 at the infinities.
__device__ __forceinline__ float fast_sigmoid(float x) { return __fdividef(1.0F, 1.0F + expf(-x)); }

}  // namespace fathom::cuda
