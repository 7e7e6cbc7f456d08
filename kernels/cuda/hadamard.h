// Hadamard transforms of rows by kernels that do not take every shape (kernels/backend.h has the op,
// hadamard.cu the kernel of any shape).
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/backend.h"
#include "kernels/cuda/check.h"

namespace fathom::cuda {

template <typename T>
struct HadamardOperands {
  T* y;
  const T* x;           // y may be x
  const float* matrix;  // [factor, factor]; null where factor is 1
  HadamardShape s;      // checked

  /// What the sums are multiplied by: 1 / sqrt(factor * power).
  float scale() const;
};

/// Sylvester's transforms alone, of rows of whole packs and blocks of up to 256 packs that are powers of two:
/// a block in the registers of a warp. With the bits of the kernel of any shape, and of the heads' transform
/// in a whole step (device/decode_code_attention.cuh). False: nothing was enqueued.
template <typename T>
bool hadamard_by_butterflies(const HadamardOperands<T>& h, cudaStream_t stream);

/// Whether the above takes it.
template <typename T>
bool takes_butterflies(const HadamardOperands<T>& h);

/// Any factor, of bf16, on tensor cores. False: it does not take the shape, and nothing was enqueued.
bool hadamard_by_signs(const HadamardOperands<bf16>& h, int multiprocessors, cudaStream_t stream);
/// The same of those whose lines have 128 columns (hadamard_lines.cu), which are most of the large ones.
bool hadamard_by_lines(const HadamardOperands<bf16>& h, int multiprocessors, cudaStream_t stream);

}  // namespace fathom::cuda
