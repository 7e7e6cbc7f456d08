// Binary cross-entropy of a router's logits against membership in the kept rows, and what the metrics say of
// a router.
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/sigmoid.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;

/// Whether `row` is among the ascending indices.
__device__ __forceinline__ bool is_member(const std::int32_t* indices, std::int64_t kept, std::int64_t row) {
  std::int64_t low = 0, high = kept;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (indices[middle] < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < kept && indices[low] == row;
}

__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.0F) + log1pf(expf(-fabsf(x))); }

/// Reads r, writes losses and dr: 12 bytes a row.
__global__ void __launch_bounds__(kThreads)
    bce_kernel(float* losses, float* dr, const float* r, const std::int32_t* indices, std::int64_t kept,
               std::int64_t rows, float scale) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows) return;
  // A member's loss is softplus(r) - r = softplus(-r), without the cancellation.
  const float sign = is_member(indices, kept, i) ? -1.0F : 1.0F;
  losses[i] = softplus(sign * r[i]);
  if (dr != nullptr) dr[i] = sign * sigmoid(sign * r[i]) * scale;
}

constexpr int kStatisticsThreads = 1024;

/// One block: reads r and p once. Counts stay exact in fp32 up to 2^24 rows.
__global__ void __launch_bounds__(kStatisticsThreads)
    statistics_kernel(float* out, const float* r, const float* p, const std::int32_t* indices,
                      std::int64_t kept, float threshold, std::int64_t rows) {
  __shared__ float shared[32];
  float sum = 0, above = 0, decided = 0, hits = 0, least = INFINITY, most = -INFINITY;
  for (std::int64_t i = threadIdx.x; i < rows; i += kStatisticsThreads) {
    const float score = r[i];
    sum += score;
    least = fminf(least, score);
    most = fmaxf(most, score);
    above += score > threshold ? 1.0F : 0.0F;
    decided += p[i] > threshold ? 1.0F : 0.0F;
  }
  for (std::int64_t k = threadIdx.x; k < kept; k += kStatisticsThreads)
    hits += p[indices[k]] > threshold ? 1.0F : 0.0F;
  sum = block_reduce(sum, Sum{}, shared);
  above = block_reduce(above, Sum{}, shared);
  decided = block_reduce(decided, Sum{}, shared);
  hits = block_reduce(hits, Sum{}, shared);
  least = block_reduce(least, Min{}, shared);
  most = block_reduce(most, Max{}, shared);
  if (threadIdx.x != 0) return;
  const auto n = static_cast<float>(rows);
  out[0] = sum / n;
  out[1] = least;
  out[2] = most;
  out[3] = above / n;
  out[4] = hits / n;
  out[5] = decided / n;
  out[6] = static_cast<float>(kept) / n;
  out[7] = 0.0F;
}

}  // namespace

void CudaBackend::membership_bce(View losses, View dr, ConstView r, ConstView indices, std::int64_t rows,
                                 double gradient_scale) {
  const char* op = "membership_bce";
  float* l = output<float>(op, "losses", losses, rows);
  float* d = optional_output<float>(op, "dr", dr, rows);
  const float* from = input<float>(op, "r", r, rows);
  const auto* kept = input<std::int32_t>(op, "indices", indices, indices.size);
  if (rows == 0) return;
  bce_kernel<<<blocks_for(rows, kThreads), kThreads, 0, stream_>>>(l, d, from, kept, indices.size, rows,
                                                                   static_cast<float>(gradient_scale));
  check_launch(op);
}

void CudaBackend::routing_statistics(View out, ConstView r, ConstView p, ConstView indices,
                                     double threshold_logit, std::int64_t rows) {
  const char* op = "routing_statistics";
  if (rows < 1) fail(op, "rows", rows, 1);
  statistics_kernel<<<1, kStatisticsThreads, 0, stream_>>>(
      output<float>(op, "out", out, 8), input<float>(op, "r", r, rows), input<float>(op, "p", p, rows),
      input<std::int32_t>(op, "indices", indices, indices.size), indices.size,
      static_cast<float>(threshold_logit), rows);
  check_launch(op);
}

}  // namespace fathom::cuda
