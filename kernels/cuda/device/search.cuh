// Binary search in ascending integers, by a warp at a time.
#pragma once

#include <cstdint>

#include "kernels/cuda/device/reduce.cuh"

namespace fathom::cuda {

/// How many of `n` ascending integers are below `value`; every lane gets the result. All lanes of the warp
/// call it with the same arguments. Each step splits the range in 32, so 8192 integers take three loads.
template <typename Integer>
__device__ __forceinline__ std::int64_t warp_lower_bound(const Integer* ascending, std::int64_t n,
                                                         Integer value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::int64_t low = 0, high = n;  // the answer lies in [low, high]
  while (low < high) {
    const std::int64_t step = (high - low + 31) / 32, probe = low + lane * step;
    const int below = __popc(__ballot_sync(kFullWarp, probe < high && ascending[probe] < value));
    if (below == 0) return low;
    const std::int64_t next = low + below * step;
    low = next - step + 1;
    high = next < high ? next : high;
  }
  return low;
}

}  // namespace fathom::cuda
