#include "kernels/cuda/check.h"
#include "kernels/cuda/column_sums.h"

namespace fathom::cuda {

namespace {

constexpr int kColumns = 32;
constexpr int kSlices = 32;  // threads that share a column

/// Reads count * width floats, which are mostly in L2: the first stage has just written them.
__global__ void __launch_bounds__(kColumns* kSlices) sum_columns(ColumnSums s) {
  __shared__ float slices[kSlices][kColumns + 1];
  const int column_in_block = static_cast<int>(threadIdx.x), slice = static_cast<int>(threadIdx.y);
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.x) * kColumns + column_in_block;
  float total = 0;
  if (column < s.width) {
#pragma unroll 4
    for (std::int64_t p = slice; p < s.count; p += kSlices) total += s.partials[p * s.stride + column];
  }
  slices[slice][column_in_block] = total;
  __syncthreads();
#pragma unroll
  for (int half = kSlices / 2; half > 0; half /= 2) {
    if (slice < half) slices[slice][column_in_block] += slices[slice + half][column_in_block];
    __syncthreads();
  }
  if (slice == 0 && column < s.width) s.out[column] += slices[0][column_in_block];
}

}  // namespace

void add_column_sums(const char* op, const ColumnSums& s, cudaStream_t stream) {
  if (s.count == 0 || s.width == 0) return;
  sum_columns<<<blocks_for(s.width, kColumns), dim3(kColumns, kSlices), 0, stream>>>(s);
  check_launch(op);
}

}  // namespace fathom::cuda
