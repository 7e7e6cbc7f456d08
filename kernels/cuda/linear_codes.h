// The products of rows of codes with weights of few bits (Backend::linear_codes_forward), as its kernels see
// them. Sums are exact in 32 bits of integer and the scales are applied in one order, so which kernel
// computes a product of one group is not seen in its bits.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/check.h"

namespace fathom::cuda {

/// y = x W^T, `batch` of them one behind the other; rows as PackedFormat has them.
template <typename T>
struct CodesOperands {
  T* y;                   // [batch, rows, out]
  const std::uint8_t* x;  // [batch, rows, x_bytes], codes of 8 bits
  const float* x_scales;  // [batch, rows]
  const std::uint8_t* w;  // [batch, out, w_bytes], codes of `bits`
  const float* w_scales;  // [batch, out, columns / group]
  std::int64_t batch, rows, out, columns, group, x_bytes, w_bytes;
  int bits;  // 4 or 8
};

/// Products of one group (group = columns), made for few rows: reads W once for every 64 of them, on tensor
/// cores. x and w begin on 16 bytes. linear_codes_few_rows.cu, for float and bf16.
template <typename T>
void codes_of_few_rows(const CodesOperands<T>& a, int multiprocessors, cudaStream_t stream);

}  // namespace fathom::cuda
