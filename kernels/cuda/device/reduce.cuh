// Sums and maxima over a warp and over a block. Their order is fixed, so results are bit-equal run to run.
#pragma once

namespace fathom::cuda {

inline constexpr unsigned kFullWarp = 0xffffffffU;

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
  static constexpr float identity = 0.0F;
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  static constexpr float identity = -INFINITY;
};
struct Min {
  __device__ __forceinline__ float operator()(float a, float b) const { return fminf(a, b); }
  static constexpr float identity = INFINITY;
};

/// Every lane gets the result.
template <typename Op>
__device__ __forceinline__ float warp_reduce(float x, Op op) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(kFullWarp, x, offset));
  return x;
}

/// Every thread gets the result. `shared` holds 32 floats and may be used again after the call. All threads
/// of the block call it; blockDim.x is a multiple of 32 and at most 1024.
template <typename Op>
__device__ __forceinline__ float block_reduce(float x, Op op, float* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  x = warp_reduce(x, op);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = warp_reduce(lane < warps ? shared[lane] : Op::identity, op);
  __syncthreads();
  return x;
}

}  // namespace fathom::cuda
