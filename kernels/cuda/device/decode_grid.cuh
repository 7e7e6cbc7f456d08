// All blocks of threads of a launch, waiting for each other: they are on the device at the same time (a
// cooperative launch). What was written before arrive() is seen by all after wait(), if it is read past the
// first cache (__ldcg).
//
// A block may have warps that compute and warps that bring weights (decode_feed.cuh). Only the first ones
// meet, within a block too: the others have a way of their own through a step.
#pragma once

#include <cuda_runtime.h>

#include "kernels/cuda/decode_step.h"

namespace fathom::cuda {

/// A barrier of the block's computing warps.
__device__ __forceinline__ void sync_workers() {
  asm volatile("bar.sync 2, %0;" ::"n"(kDecodeThreads) : "memory");
}

class Grid {
 public:
  /// `counters`: two. Number `turn`, this launch's, is zero; the other one is made so for the next launch.
  __device__ Grid(unsigned* counters, int turn) : counter_(counters + turn) {
    if (blockIdx.x == 0 && threadIdx.x == 0) counters[1 - turn] = 0;
  }
  /// Between arrive() and wait() a block may do what needs nothing of the others.
  __device__ __forceinline__ void arrive() {
    sync_workers();
    if (threadIdx.x == 0) signal();
  }
  /// The same for the first `warps` warps alone, where no other has written anything.
  __device__ __forceinline__ void arrive_with(int warps) {
    asm volatile("bar.sync 1, %0;" ::"r"(32 * warps) : "memory");
    if (threadIdx.x == 0) signal();
  }
  /// For all threads. The last warp looks: the first ones may come late, they have results to add up.
  __device__ __forceinline__ void wait() {
    if (threadIdx.x == kDecodeThreads - 1) {
      target_ += gridDim.x;
      unsigned arrived;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter_) : "memory");
      } while (arrived < target_);
    }
    sync_workers();
  }

 private:
  __device__ __forceinline__ void signal() {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter_) : "memory");
  }

  unsigned* counter_;
  unsigned target_ = 0;  // arrivals until now, if all have come
};

}  // namespace fathom::cuda
