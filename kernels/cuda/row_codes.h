// Kernels that make rows and turn them into codes of few bits in one pass (Backend::make_codes,
// row_codes.cu). Each does nothing and returns false where it does not take the shape.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/hadamard.h"

namespace fathom::cuda {

struct CodesOut;  // device/row_codes.cuh
template <typename T>
struct NormRows;  // device/norm_rows.cuh

/// Norms; p.y and p.rstd are not used. norm_codes.cu, for float and bf16.
template <typename T>
bool norm_codes(const NormRows<T>& p, const CodesOut& out, cudaStream_t stream);

/// Hadamard transforms with the bits of the kernel of the same name (hadamard.h), of x or of its SwiGLU: then
/// h.x is gate_up, and h.s of the rows that it makes. h.y is not used.
template <typename T>
bool hadamard_codes_by_butterflies(const HadamardOperands<T>& h, bool swiglu, const CodesOut& out,
                                   cudaStream_t stream);
/// hadamard_lines.cu.
bool hadamard_codes_by_lines(const HadamardOperands<bf16>& h, bool swiglu, const CodesOut& out,
                             int multiprocessors, cudaStream_t stream);

}  // namespace fathom::cuda
