// In which order a kernel walks over rows that the kernel before it has just written.
//
// That kernel went through them in ascending order, so the last tens of megabytes lie in the L2 cache still,
// and the first have left it. Who begins at the end finds those there, as long as what else it reads and
// writes does not drive them out: that goes with Pack::load_once and store_once (vector.cuh).
#pragma once

namespace fathom::cuda {

/// Of blocks that start in ascending order of blockIdx.x: the last part of the work for the first of them.
__device__ __forceinline__ unsigned last_part_first() { return gridDim.x - 1 - blockIdx.x; }

}  // namespace fathom::cuda
