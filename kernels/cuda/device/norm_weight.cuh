// What a norm's weight counts as: backend.h, kLeastNormWeight.
#pragma once

#include "kernels/backend.h"

namespace fathom::cuda {

__device__ __forceinline__ float held_weight(float w) {
  return fabsf(w) < kLeastNormWeight ? copysignf(kLeastNormWeight, w) : w;
}

}  // namespace fathom::cuda
