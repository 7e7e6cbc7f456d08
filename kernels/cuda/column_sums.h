// The second stage of sums over rows: gradients of norm weights and biases.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

namespace fathom::cuda {

/// out[j] += the sum over p < count of partials[p * stride + j], j < width, in a fixed order.
struct ColumnSums {
  float* out = nullptr;
  const float* partials = nullptr;
  std::int64_t count = 0;
  std::int64_t width = 0;
  std::int64_t stride = 0;
};
void add_column_sums(const char* op, const ColumnSums& s, cudaStream_t stream);

}  // namespace fathom::cuda
