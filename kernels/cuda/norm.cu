// RMSNorm (Zhang & Sennrich 2019), alone and after a residual addition. Backward: norm_backward.cu.
//
// y = x s w with s = 1/sqrt(mean(x^2) + eps). With c = mean(w dy x): dx = s (w dy) - x s^3 c, dw = sum dy x
// s. Where y was kept and x was not, x s = y / w, and s c = mean(dy y). A row stays in the registers of one
// warp (of four, when it is wide), so that memory sees each element once; the order of a row's sums depends
// on the width alone. Wider rows, and those that are no multiple of 16 bytes, take a block and two passes.
// The norm is of h as it was stored, rounded, since that is what the backward sees.
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/norm_rows.cuh"
#include "kernels/cuda/device/norm_weight.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace fathom::cuda {

namespace {

constexpr int kGenericThreads = 256;

/// Reads x (and a), writes y (and h): 2 or 4 * rows * width elements.
template <typename T, int kPacks, int kWarps>
__global__ void __launch_bounds__(128) forward_packed(NormRows<T> p) {
  constexpr int kN = kPack<T>, kLanes = 32 * kWarps;
  const NormedRow<T, kPacks, kWarps> row(p);
  if (row.number >= p.rows) return;  // whole warps; of several warps a row there is none
  if (row.lane == 0) p.rstd[row.number] = row.reciprocal;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = row.lane + k * kLanes;
    if (i < row.packs) store_once_raw(p.y + row.number * p.width + i * kN, row.normed(p, k));
  }
}

/// A block a row; reads x (or h) twice, the second time mostly from cache.
template <typename T>
__global__ void __launch_bounds__(kGenericThreads) forward_any(NormRows<T> p) {
  __shared__ float shared[32];
  const std::int64_t row = blockIdx.x, start = row * p.width;
  float squares = 0;
  for (std::int64_t j = threadIdx.x; j < p.width; j += kGenericThreads) {
    float value = to_float(p.x[start + j]);
    if (p.a != nullptr) {
      const T sum = from_float<T>(value + to_float(p.a[start + j]));
      p.h[start + j] = sum;
      value = to_float(sum);
    }
    squares += value * value;
  }
  squares = block_reduce(squares, Sum{}, shared);
  const float reciprocal = 1.0F / sqrtf(squares / static_cast<float>(p.width) + p.eps);
  if (threadIdx.x == 0) p.rstd[row] = reciprocal;
  const T* from = (p.a != nullptr ? p.h : p.x) + start;  // a thread reads back what it wrote itself
  for (std::int64_t j = threadIdx.x; j < p.width; j += kGenericThreads) {
    p.y[start + j] = from_float<T>(to_float(from[j]) * reciprocal * held_weight(p.w[j]));
  }
}

template <typename T>
void launch_forward(cudaStream_t stream, const char* op, const NormRows<T>& p) {
  if (p.rows == 0 || p.width == 0) return;
  const bool aligned = packs<T>(p.x, p.width) && packs<T>(p.y, p.width) && packs<float>(p.w, p.width) &&
                       packs<T>(p.a, p.width) && packs<T>(p.h, p.width);
  const bool done = aligned && for_row_class(p.width / kPack<T>, [&](auto c) {
                      using Class = decltype(c);
                      const unsigned grid = blocks_for(p.rows, 4 / Class::warps);
                      forward_packed<T, Class::packs, Class::warps><<<grid, 128, 0, stream>>>(p);
                    });
  if (!done) forward_any<T><<<blocks_for(p.rows, 1), kGenericThreads, 0, stream>>>(p);
  check_launch(op);
}

}  // namespace

void CudaBackend::rms_norm_forward(View y, View rstd, ConstView x, ConstView w, const NormShape& s) {
  const char* op = "rms_norm_forward";
  const std::int64_t n = s.rows * s.width;
  for_compute_type(op, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_forward<T>(
        stream_, op,
        {nullptr, output<T>(op, "y", y, n), output<float>(op, "rstd", rstd, s.rows), input<T>(op, "x", x, n),
         nullptr, input<float>(op, "w", w, s.width), s.rows, s.width, static_cast<float>(s.eps)});
  });
}

void CudaBackend::add_rms_norm_forward(View h, View y, View rstd, ConstView x, ConstView a, ConstView w,
                                       const NormShape& s) {
  const char* op = "add_rms_norm_forward";
  const std::int64_t n = s.rows * s.width;
  for_compute_type(op, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_forward<T>(
        stream_, op,
        {output<T>(op, "h", h, n), output<T>(op, "y", y, n), output<float>(op, "rstd", rstd, s.rows),
         input<T>(op, "x", x, n), input<T>(op, "a", a, n), input<float>(op, "w", w, s.width), s.rows, s.width,
         static_cast<float>(s.eps)});
  });
}

}  // namespace fathom::cuda
