// All blocks of threads of a launch, waiting for each other: they are on the device at the same time (a
// cooperative launch). What was written before arrive() is seen by all after wait(), if it is read past the
// first cache (__ldcg).
#pragma once

#include <cuda_runtime.h>

namespace fathom::cuda {

class Grid {
 public:
  /// `counters`: two. Number `turn`, this launch's, is zero; the other one is made so for the next launch.
  __device__ Grid(unsigned* counters, int turn) : counter_(counters + turn) {
    if (blockIdx.x == 0 && threadIdx.x == 0) counters[1 - turn] = 0;
  }
  /// Between arrive() and wait() a block may do what needs nothing of the others.
  __device__ __forceinline__ void arrive() {
    __syncthreads();
    if (threadIdx.x == 0) signal();
  }
  /// The same for the first `warps` warps alone, where no other has written anything.
  __device__ __forceinline__ void arrive_with(int warps) {
    asm volatile("bar.sync 1, %0;" ::"r"(32 * warps) : "memory");
    if (threadIdx.x == 0) signal();
  }
  /// For all threads. The last warp looks: the first ones may come late, they have results to add up.
  __device__ __forceinline__ void wait() {
    if (threadIdx.x == blockDim.x - 1) {
      target_ += gridDim.x;
      unsigned arrived;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(counter_) : "memory");
      } while (arrived < target_);
    }
    __syncthreads();
  }

 private:
  __device__ __forceinline__ void signal() {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter_) : "memory");
  }

  unsigned* counter_;
  unsigned target_ = 0;  // arrivals until now, if all have come
};

}  // namespace fathom::cuda
