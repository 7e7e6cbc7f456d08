// Our own attention kernels. What they compute and the layout of their arguments: attention_forward and
// attention_backward of kernels/backend.h. All are deterministic: no atomics, every sum in a fixed order.
//
// The row kernels (attention_rows.cu) take any dtype and head size and are row-invariant: a row's result
// depends on its keys alone. The flash kernels (attention_flash_*.cu) are for bf16 on the tensor cores.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/backend.h"
#include "kernels/cuda/check.h"

namespace fathom::cuda {

template <typename T>
struct AttentionForward {
  T* out = nullptr;
  float* lse = nullptr;
  const T* qkv = nullptr;
  const std::int32_t* first_key = nullptr;  // null: every query sees its sequence from the start
  AttentionShape shape;
};

template <typename T>
struct AttentionBackward {
  T* dqkv = nullptr;
  const T* dout = nullptr;
  const T* out = nullptr;
  const float* lse = nullptr;
  const T* qkv = nullptr;
  const std::int32_t* first_key = nullptr;
  float* delta = nullptr;  // scratch [B, H, T]: sum of dout * out over a head
  AttentionShape shape;
};

inline constexpr std::int64_t kMaxRowHeadDim = 256;  // CudaBackend::most_head_dim()

/// Head sizes up to kMaxRowHeadDim. T: float or bf16.
template <typename T>
void attend_rows(const AttentionForward<T>& a, cudaStream_t stream);
template <typename T>
void attend_rows_backward(const AttentionBackward<T>& a, cudaStream_t stream);
/// delta[b, h, t] = sum of dout * out over the head.
template <typename T>
void attention_delta(const AttentionBackward<T>& a, cudaStream_t stream);

/// Head sizes that are multiples of 8 up to 128, and a positive scale.
bool flash_supports(const AttentionShape& s);
void attend_flash(const AttentionForward<bf16>& a, cudaStream_t stream);
void attend_flash_backward(const AttentionBackward<bf16>& a, cudaStream_t stream);

/// Sequences of which a block holds all keys and values in shared memory, on a device that has as much;
/// without first_key.
bool short_flash_supports(const AttentionShape& s);
/// Does not use `delta`.
void attend_short_flash_backward(const AttentionBackward<bf16>& a, cudaStream_t stream);

void first_keys_of(std::int32_t* first_key, const std::int32_t* documents, std::int64_t batch,
                   std::int64_t seq, cudaStream_t stream);

}  // namespace fathom::cuda
