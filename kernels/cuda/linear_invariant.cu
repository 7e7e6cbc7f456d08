// A tiled product on the fp32 units. Each element is one chain of fused multiply-adds over k in ascending
// order, so it depends on nothing but its own row and column: not on the number of rows, their order, or the
// tile it falls in. Library products choose their kernel, and with it the order of the sum, by the number of
// rows.
#include "kernels/cuda/check.h"
#include "kernels/cuda/device/vector.cuh"
#include "kernels/cuda/linear_invariant.h"

namespace fathom::cuda {

namespace {

constexpr int kTile = 64;      // rows and columns of y that a block computes
constexpr int kDepth = 16;     // of k at a time
constexpr int kThreads = 256;  // 16 x 16, each 4 x 4 elements
constexpr int kEach = 4;

// Floor: 2 rows*in*out operations of the fp32 units; x and w are read once a tile of the other.
template <typename T, typename Out>
__global__ void __launch_bounds__(kThreads) invariant_product(Out* y, const T* x, const T* w, LinearShape s) {
  __shared__ float x_tile[kDepth][kTile + 1];
  __shared__ float w_tile[kDepth][kTile + 1];
  const std::int64_t row0 = static_cast<std::int64_t>(blockIdx.y) * kTile;
  const std::int64_t column0 = static_cast<std::int64_t>(blockIdx.x) * kTile;
  const int tx = static_cast<int>(threadIdx.x) % 16, ty = static_cast<int>(threadIdx.x) / 16;
  const std::int64_t x_row = s.x_row();
  float sum[kEach][kEach] = {};
  for (std::int64_t k0 = 0; k0 < s.in; k0 += kDepth) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kDepth; i += kThreads) {
      const int k = i % kDepth, r = i / kDepth;
      const bool inside = k0 + k < s.in;
      x_tile[k][r] = inside && row0 + r < s.rows ? to_float(x[(row0 + r) * x_row + k0 + k]) : 0.0F;
      w_tile[k][r] = inside && column0 + r < s.out ? to_float(w[(column0 + r) * s.in + k0 + k]) : 0.0F;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float a[kEach], b[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        a[i] = x_tile[k][ty + 16 * i];
        b[i] = w_tile[k][tx + 16 * i];
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) sum[i][j] = fmaf(a[i], b[j], sum[i][j]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const std::int64_t row = row0 + ty + 16 * i, column = column0 + tx + 16 * j;
      if (row < s.rows && column < s.out) y[row * s.out + column] = from_float<Out>(sum[i][j]);
    }
  }
}

}  // namespace

template <typename T, typename Out>
void linear_invariant(Out* y, const T* x, const T* w, const LinearShape& s, cudaStream_t stream) {
  if (s.rows == 0 || s.out == 0) return;
  constexpr std::int64_t kMostRows = 65535 * kTile;  // of a grid
  for (std::int64_t done = 0; done < s.rows; done += kMostRows) {
    LinearShape part = s;
    part.rows = s.rows - done < kMostRows ? s.rows - done : kMostRows;
    const dim3 grid(blocks_for(s.out, kTile), blocks_for(part.rows, kTile));
    invariant_product<T, Out><<<grid, kThreads, 0, stream>>>(y + done * s.out, x + done * s.x_row(), w, part);
    check_launch("linear");
  }
}

template void linear_invariant(float*, const float*, const float*, const LinearShape&, cudaStream_t);
template void linear_invariant(bf16*, const bf16*, const bf16*, const LinearShape&, cudaStream_t);
template void linear_invariant(float*, const bf16*, const bf16*, const LinearShape&, cudaStream_t);

}  // namespace fathom::cuda
