// RoPE after RMSNorm of every query and key head: the part of rope_forward and rope_backward with QK-norm.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/backend.h"

namespace fathom::cuda {

/// Rows of (H + 2G) heads of d elements; `frequencies` [d/2] in device memory.
template <typename T>
struct QkNormForward {
  T* out;
  float* rstd;  // [rows, H + G]
  const T* qkv;
  const std::int32_t* positions;
  const float* frequencies;
  const float* q_weight;
  const float* k_weight;
};

template <typename T>
struct QkNormBackward {
  T* dqkv;
  float* weight_partials;  // [qk_norm_partials, 2d]: first those of q_weight, then of k_weight
  const T* dout;
  const T* qkv;
  const float* rstd;
  const std::int32_t* positions;
  const float* frequencies;
  const float* q_weight;
  const float* k_weight;
};

/// How many rows of partial sums the backward needs room for.
std::int64_t qk_norm_partials(int multiprocessors);

template <typename T>
void qk_norm_rope_forward(const QkNormForward<T>& p, const QkvShape& s, cudaStream_t stream);
/// Returns how many rows of partial sums it leaves.
template <typename T>
std::int64_t qk_norm_rope_backward(const QkNormBackward<T>& p, const QkvShape& s, std::int64_t most_partials,
                                   cudaStream_t stream);

}  // namespace fathom::cuda
