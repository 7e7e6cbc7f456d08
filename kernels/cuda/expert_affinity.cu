// The softmax of an expert router, transposed: each choice has its rows one after the other.
#include <cuda_runtime.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;

struct Forward {
  float* affinity;      // [choices, rows]
  float* lse;           // [rows], or null
  const float* logits;  // [rows, choices]
  std::int64_t rows, choices;
};

/// A thread a row. Its logits are next to each other, so that a warp's lie in the lines that its three passes
/// share. Traffic: a read of the logits, a write of the affinity and, where the exponentials are kept in it
/// on the way, another read and write.
__global__ void __launch_bounds__(kThreads) affinity_kernel(Forward f) {
  const std::int64_t n = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= f.rows) return;
  const float* row = f.logits + n * f.choices;
  float most = row[0];
  for (std::int64_t e = 1; e < f.choices; ++e) most = fmaxf(most, row[e]);
  float sum = 0.0F;
  for (std::int64_t e = 0; e < f.choices; ++e) {
    const float p = expf(row[e] - most);
    f.affinity[e * f.rows + n] = p;
    sum += p;
  }
  for (std::int64_t e = 0; e < f.choices; ++e) f.affinity[e * f.rows + n] /= sum;
  if (f.lse != nullptr) f.lse[n] = most + logf(sum);
}

template <typename T>
struct Backward {
  T* dlogits;              // [rows, choices]
  const float* daffinity;  // [choices, rows], or null
  const float* dlse;       // [rows], or null
  const float* affinity;   // [choices, rows]
  std::int64_t rows, choices;
};

/// A thread a row. Traffic: two reads of the affinity and of its gradient (the second from cache), a write of
/// dlogits.
template <typename T>
__global__ void __launch_bounds__(kThreads) affinity_backward_kernel(Backward<T> b) {
  const std::int64_t n = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= b.rows) return;
  float common = b.dlse == nullptr ? 0.0F : b.dlse[n];
  if (b.daffinity != nullptr) {
    for (std::int64_t e = 0; e < b.choices; ++e) {
      common -= b.affinity[e * b.rows + n] * b.daffinity[e * b.rows + n];
    }
  }
  for (std::int64_t e = 0; e < b.choices; ++e) {
    const float own = b.daffinity == nullptr ? 0.0F : b.daffinity[e * b.rows + n];
    b.dlogits[n * b.choices + e] = from_float<T>(b.affinity[e * b.rows + n] * (own + common));
  }
}

}  // namespace

void CudaBackend::expert_affinity_forward(View affinity, View lse, ConstView logits, std::int64_t rows,
                                          std::int64_t choices) {
  const char* op = "expert_affinity_forward";
  if (choices < 1) fail(op, "choices", choices, 1);
  const Forward f{output<float>(op, "affinity", affinity, rows * choices),
                  optional_output<float>(op, "lse", lse, rows),
                  input<float>(op, "logits", logits, rows * choices), rows, choices};
  if (rows == 0) return;
  affinity_kernel<<<blocks_for(rows, kThreads), kThreads, 0, stream()>>>(f);
  check_launch(op);
}

void CudaBackend::expert_affinity_backward(View dlogits, ConstView daffinity, ConstView dlse,
                                           ConstView affinity, std::int64_t rows, std::int64_t choices) {
  const char* op = "expert_affinity_backward";
  for_compute_type(op, dlogits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Backward<T> b{output<T>(op, "dlogits", dlogits, rows * choices),
                        optional_input<float>(op, "daffinity", daffinity, rows * choices),
                        optional_input<float>(op, "dlse", dlse, rows),
                        input<float>(op, "affinity", affinity, rows * choices),
                        rows,
                        choices};
    if (rows == 0) return;
    affinity_backward_kernel<T><<<blocks_for(rows, kThreads), kThreads, 0, stream()>>>(b);
    check_launch(op);
  });
}

}  // namespace fathom::cuda
