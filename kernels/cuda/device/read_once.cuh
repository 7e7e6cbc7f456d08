// Memory that a launch reads once, of which there is more than the second cache holds.
#pragma once

#include <cstdint>

namespace fathom::cuda {

/// For loads' L2::cache_hint: their lines are the first to go from the second cache, so that what is read
/// again and again stays there. As policy_of_once (mma.cuh), but made where it is wanted: no register has to
/// hold it.
__device__ __forceinline__ std::uint64_t read_once() {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

}  // namespace fathom::cuda
