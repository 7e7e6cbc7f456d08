// y = x W^T of codes of 8 bits by CUTLASS on Hopper's tensor cores (codes_gemm.cu). Builds without CUTLASS's
// headers have codes_gemm_absent.cpp in its place, which takes nothing.
#pragma once

#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/cuda/check.h"

namespace fathom::cuda {

/// Products of `batch` matrices side by side: y[r][o] = (sum of x's codes * w's codes) * w_scales[o] *
/// x_scales[r], rounded after each step and then to bf16; and then base + that, rounded again. All row by
/// row, one behind the other.
struct CodesGemm {
  bf16* y;                // [batch, rows, out]
  const bf16* base;       // as y, and not y; null: none
  const std::uint8_t* x;  // [batch, rows, row_bytes] in two's complement
  const float* x_scales;  // [batch, rows]
  const std::uint8_t* w;  // [batch, out, row_bytes] in two's complement
  const float* w_scales;  // [batch, out]
  std::int64_t batch, rows, out;
  std::int64_t row_bytes;  // a multiple of 16; what lies behind the last column is zero
};

/// CUTLASS's version, "4.2.0"; empty: this build is without it.
const char* codes_gemm_version();
/// Why it is, or empty.
const char* why_no_codes_gemm();

/// Whether it computes such a product: outs by eights; y, x and w begin on 16 bytes; the current device is a
/// Hopper. Never with FATHOM_CUTLASS=0 in the environment, for comparisons.
bool takes_codes_gemm(const CodesGemm& g);

/// Enqueues a product that takes_codes_gemm(); it allocates nothing. InternalError: CUTLASS or CUDA refused.
void codes_gemm(const CodesGemm& g, int multiprocessors, cudaStream_t stream);

}  // namespace fathom::cuda
