// The logits of a router of choices, transposed and with their bias: each choice has its rows one after the
// other, as selection reads them.
#include <cuda_runtime.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/reduce.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;

/// A thread a row. Traffic: a read of the logits, whose lines a warp's passes share, and a write of the
/// scores.
__global__ void __launch_bounds__(kThreads)
    scores_kernel(float* scores, const float* logits, const float* bias, std::int64_t rows,
                  std::int64_t choices) {
  const std::int64_t n = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= rows) return;
  for (std::int64_t e = 0; e < choices; ++e) {
    scores[e * rows + n] = logits[n * choices + e] + (bias == nullptr ? 0.0F : bias[e]);
  }
}

/// A thread a row. Traffic: a read of dscores, a write of dlogits.
__global__ void __launch_bounds__(kThreads)
    scores_backward_kernel(float* dlogits, const float* dscores, std::int64_t rows, std::int64_t choices) {
  const std::int64_t n = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= rows) return;
  for (std::int64_t e = 0; e < choices; ++e) dlogits[n * choices + e] = dscores[e * rows + n];
}

/// A block a choice. Traffic: a read of dscores.
__global__ void __launch_bounds__(kThreads)
    bias_backward_kernel(float* dbias, const float* dscores, std::int64_t rows) {
  __shared__ float shared[32];
  const float* own = dscores + std::int64_t{blockIdx.x} * rows;
  float sum = 0.0F;
  for (std::int64_t n = threadIdx.x; n < rows; n += kThreads) sum += own[n];
  sum = block_reduce(sum, Sum{}, shared);
  if (threadIdx.x == 0) dbias[blockIdx.x] += sum;
}

}  // namespace

void CudaBackend::choice_scores_forward(View scores, ConstView logits, ConstView bias, std::int64_t rows,
                                        std::int64_t choices) {
  const char* op = "choice_scores_forward";
  float* to = output<float>(op, "scores", scores, rows * choices);
  const float* from = input<float>(op, "logits", logits, rows * choices);
  const float* shift = optional_input<float>(op, "bias", bias, choices);
  if (rows == 0) return;
  scores_kernel<<<blocks_for(rows, kThreads), kThreads, 0, stream()>>>(to, from, shift, rows, choices);
  check_launch(op);
}

void CudaBackend::choice_scores_backward(View dlogits, View dbias_accumulate, ConstView dscores,
                                         std::int64_t rows, std::int64_t choices) {
  const char* op = "choice_scores_backward";
  float* to = output<float>(op, "dlogits", dlogits, rows * choices);
  float* dbias = optional_output<float>(op, "dbias", dbias_accumulate, choices);
  const float* from = input<float>(op, "dscores", dscores, rows * choices);
  if (rows == 0 || choices == 0) return;
  scores_backward_kernel<<<blocks_for(rows, kThreads), kThreads, 0, stream()>>>(to, from, rows, choices);
  check_launch(op);
  if (dbias == nullptr) return;
  bias_backward_kernel<<<static_cast<unsigned>(choices), kThreads, 0, stream()>>>(dbias, from, rows);
  check_launch(op);
}

}  // namespace fathom::cuda
