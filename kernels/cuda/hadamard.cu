// Hadamard transforms of rows: which kernel takes them, and the one of any shape. A thread block of it holds
// a run of blocks of a row in shared memory, as floats: the butterflies of Sylvester's part there, and the K
// x K part, sum by sum, on the way out.
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/vector.cuh"
#include "kernels/cuda/hadamard.h"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMostFactor = 512;
constexpr std::int64_t kEnough = 2048;  // elements that keep a thread block busy

template <typename T>
struct Arguments {
  T* y;
  const T* x;
  const float* matrix;
  std::int64_t x_row, y_row, width, runs;  // runs: of a row
  int run;                                 // elements, whole blocks; a row's last run may be shorter
  int factor, apart, inner;                // apart: power * inner
  float scale;
};

/// Reads x, writes y: 2 * rows * width elements.
template <typename T>
__global__ void __launch_bounds__(kThreads) hadamard_kernel(Arguments<T> a) {
  extern __shared__ float part[];
  const std::int64_t row = blockIdx.x / a.runs, first = blockIdx.x % a.runs * a.run;
  const int n = static_cast<int>(min(static_cast<std::int64_t>(a.run), a.width - first));
  const T* from = a.x + row * a.x_row + first;
  T* to = a.y + row * a.y_row + first;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) part[i] = to_float(from[i]);
  __syncthreads();
  for (int half = a.inner; half < a.apart; half *= 2) {
    for (int i = static_cast<int>(threadIdx.x); i < n / 2; i += kThreads) {
      const int at = i / half * 2 * half + i % half;
      const float low = part[at], high = part[at + half];
      part[at] = low + high;
      part[at + half] = low - high;
    }
    __syncthreads();
  }
  const int block = a.factor * a.apart;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
    float sum = part[i];
    if (a.factor > 1) {
      const int in_block = i % block;
      const float* of = part + (i - in_block) + in_block % a.apart;
      const float* signs = a.matrix + in_block / a.apart * a.factor;
      sum = 0;
      for (int k = 0; k < a.factor; ++k) sum = fmaf(signs[k], of[k * a.apart], sum);
    }
    to[i] = from_float<T>(sum * a.scale);
  }
}

template <typename T>
void launch_any(const HadamardOperands<T>& h, cudaStream_t stream) {
  const HadamardShape& s = h.s;
  const std::int64_t together = std::min(s.blocks, std::max<std::int64_t>(1, kEnough / s.block()));
  const std::int64_t run = together * s.block(), runs = (s.width() + run - 1) / run;
  launch("hadamard_forward", hadamard_kernel<T>,
         {static_cast<unsigned>(s.rows * runs), kThreads, static_cast<std::size_t>(run) * sizeof(float)},
         stream,
         Arguments<T>{h.y, h.x, h.matrix, s.x_row(), s.y_row(), s.width(), runs, static_cast<int>(run),
                      static_cast<int>(s.factor), static_cast<int>(s.power * s.inner),
                      static_cast<int>(s.inner), h.scale()});
}

}  // namespace

template <typename T>
float HadamardOperands<T>::scale() const {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(s.factor * s.power)));
}
template struct HadamardOperands<float>;
template struct HadamardOperands<bf16>;

void CudaBackend::hadamard_forward(View y, ConstView x, ConstView matrix, const HadamardShape& s) {
  const char* op = "hadamard_forward";
  if (s.power < 1 || (s.power & (s.power - 1)) != 0) fail(op, "power", s.power, 1);
  if (s.factor < 1 || s.factor > kMostFactor) fail(op, "factor", s.factor, kMostFactor);
  if (s.blocks < 1 || s.inner < 1) fail(op, "blocks", s.blocks, 1);
  if (s.x_row() < s.width() || s.y_row() < s.width()) fail(op, "stride", s.x_row(), s.width());
  const std::int64_t fits = (most_shared_bytes() - 1024) / static_cast<std::int64_t>(sizeof(float));
  if (s.block() > fits) fail(op, "elements of a block", s.block(), fits);
  const float* m = s.factor > 1 ? input<float>(op, "matrix", matrix, s.factor * s.factor) : nullptr;
  for_compute_type(op, x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = output<T>(op, "y", y, s.y_size());
    const T* in = input<T>(op, "x", x, s.x_size());
    if (out == in && s.x_row() != s.y_row()) fail(op, "stride of y", s.y_row(), s.x_row());
    const HadamardOperands<T> operands{out, in, m, s};
    if (hadamard_by_butterflies(operands, stream())) return;
    if constexpr (std::is_same_v<T, bf16>) {
      if (hadamard_by_lines(operands, multiprocessors(), stream())) return;
      if (hadamard_by_signs(operands, multiprocessors(), stream())) return;
    }
    launch_any(operands, stream());
  });
}

}  // namespace fathom::cuda
