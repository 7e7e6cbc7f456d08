// RMSNorm (Zhang & Sennrich 2019), alone and after a residual addition.
//
// y = x s w with s = 1/sqrt(mean(x^2) + eps). With c = mean(w dy x): dx = s (w dy) - x s^3 c, dw = sum dy x
// s. Where y was kept and x was not, x s = y / w, and s c = mean(dy y). A row stays in the registers of one
// warp (of four, when it is wide), so that memory sees each element once; the order of a row's sums depends
// on the width alone. Wider rows, and those that are no multiple of 16 bytes, take a block and two passes.
// The norm is of h as it was stored, rounded, since that is what the backward sees.
#include "kernels/cuda/check.h"
#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/order.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/row_packs.cuh"

namespace fathom::cuda {

namespace {

template <typename T>
struct Forward {
  T* h;  // null: no addition
  T* y;
  float* rstd;
  const T* x;
  const T* a;  // null: no addition
  const float* w;
  std::int64_t rows;
  std::int64_t width;
  float eps;
};

template <typename T>
struct Backward {
  T* dx;
  float* dw_partials;  // [gridDim.x, width]
  const T* dh;         // may be null
  const T* dy;
  const T* x;  // or y: see From
  const float* w;
  const float* rstd;
  std::int64_t rows;
  std::int64_t width;
};

/// What a backward reads beside dy: the norm's input, or its output.
enum class From : std::uint8_t { Input, Output };

/// What a weight counts as.
__device__ __forceinline__ float held(float w) {
  return fabsf(w) < kLeastNormWeight ? copysignf(kLeastNormWeight, w) : w;
}

constexpr int kGenericThreads = 256;
constexpr int kBackwardThreads = 128;

template <int kWarps>
__device__ __forceinline__ float row_sum(float x, float* shared) {
  return kWarps == 1 ? warp_reduce(x, Sum{}) : block_reduce(x, Sum{}, shared);
}

/// Reads x (and a), writes y (and h): 2 or 4 * rows * width elements.
template <typename T, int kPacks, int kWarps>
__global__ void __launch_bounds__(128) forward_packed(Forward<T> p) {
  constexpr int kN = kPack<T>, kLanes = 32 * kWarps, kRows = 128 / kLanes;
  __shared__ float shared[32];
  const int lane = static_cast<int>(threadIdx.x) % kLanes, packs = static_cast<int>(p.width / kN);
  const std::int64_t row =
      static_cast<std::int64_t>(last_part_first()) * kRows + static_cast<int>(threadIdx.x) / kLanes;
  if (row >= p.rows) return;  // whole warps; with kRows = 1 there is none
  const std::int64_t start = row * p.width;
  uint4 raw[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = lane + k * kLanes;
    raw[k] = i < packs ? load_once_raw(p.x + start + i * kN) : uint4{};
  }
  if (p.a != nullptr) {
    uint4 other[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int i = lane + k * kLanes;
      other[k] = i < packs ? load_raw(p.a + start + i * kN) : uint4{};
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int i = lane + k * kLanes;
      Pack<T> sum = unpack<T>(raw[k]);
      const Pack<T> addend = unpack<T>(other[k]);
#pragma unroll
      for (int e = 0; e < kN; ++e) sum.v[e] += addend.v[e];
      raw[k] = repack(sum);
      if (i < packs) store_once_raw(p.h + start + i * kN, raw[k]);
    }
  }
  float squares = 0;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const Pack<T> values = unpack<T>(raw[k]);
#pragma unroll
    for (int e = 0; e < kN; ++e) squares += values.v[e] * values.v[e];
  }
  squares = row_sum<kWarps>(squares, shared);
  const float reciprocal = 1.0F / sqrtf(squares / static_cast<float>(p.width) + p.eps);
  if (lane == 0) p.rstd[row] = reciprocal;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = lane + k * kLanes;
    if (i >= packs) continue;
    float w[kN];
    load_floats(w, p.w + i * kN);
    Pack<T> values = unpack<T>(raw[k]);
#pragma unroll
    for (int e = 0; e < kN; ++e) values.v[e] = values.v[e] * reciprocal * held(w[e]);
    store_once_raw(p.y + start + i * kN, repack(values));
  }
}

/// A block a row; reads x (or h) twice, the second time mostly from cache.
template <typename T>
__global__ void __launch_bounds__(kGenericThreads) forward_any(Forward<T> p) {
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
    p.y[start + j] = from_float<T>(to_float(from[j]) * reciprocal * held(p.w[j]));
  }
}

/// Reads dy and x (and dh), writes dx: 3 or 4 * rows * width elements. Every warp (or block of four) walks
/// rows with its part of dw in registers; a block's sum of them is one row of the partials.
template <typename T, int kPacks, int kWarps, From kFrom>
__global__ void __launch_bounds__(kBackwardThreads, kPacks <= 4 ? 4 : 2) backward_packed(Backward<T> p) {
  constexpr int kN = kPack<T>, kLanes = 32 * kWarps, kRows = kBackwardThreads / kLanes;
  __shared__ float shared[32];
  const int lane = static_cast<int>(threadIdx.x) % kLanes, team = static_cast<int>(threadIdx.x) / kLanes;
  const int packs = static_cast<int>(p.width / kN);
  float dw[kPacks][kN] = {};
  for (std::int64_t row = p.rows - 1 - (static_cast<std::int64_t>(blockIdx.x) * kRows + team); row >= 0;
       row -= static_cast<std::int64_t>(gridDim.x) * kRows) {
    const std::int64_t start = row * p.width;
    uint4 x[kPacks], dy[kPacks], dh[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int i = lane + k * kLanes;
      x[k] = i < packs ? load_once_raw(p.x + start + i * kN) : uint4{};
      dy[k] = i < packs ? load_raw(p.dy + start + i * kN) : uint4{};
      dh[k] = uint4{};
    }
    if (p.dh != nullptr) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int i = lane + k * kLanes;
        if (i < packs) dh[k] = load_once_raw(p.dh + start + i * kN);
      }
    }
    const float reciprocal = p.rstd[row];
    float product = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int i = lane + k * kLanes;
      if (i >= packs) continue;
      const Pack<T> values = unpack<T>(x[k]), douts = unpack<T>(dy[k]);
      if constexpr (kFrom == From::Output) {
#pragma unroll
        for (int e = 0; e < kN; ++e) {
          const float t = douts.v[e] * values.v[e];
          product += t;
          dw[k][e] += t;  // of w dw
        }
      } else {
        float w[kN];
        load_floats(w, p.w + i * kN);
#pragma unroll
        for (int e = 0; e < kN; ++e) {
          const float t = douts.v[e] * values.v[e];
          product += t * w[e];
          dw[k][e] += t * reciprocal;
        }
      }
    }
    product = row_sum<kWarps>(product, shared) / static_cast<float>(p.width);
    const float pull =
        kFrom == From::Output ? reciprocal * product : reciprocal * reciprocal * reciprocal * product;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int i = lane + k * kLanes;
      if (i >= packs) continue;
      float w[kN];
      load_floats(w, p.w + i * kN);
      const Pack<T> values = unpack<T>(x[k]), douts = unpack<T>(dy[k]);
      Pack<T> through = unpack<T>(dh[k]);
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        if constexpr (kFrom == From::Output) {
          const float weight = held(w[e]);
          through.v[e] += reciprocal * weight * douts.v[e] - pull * (values.v[e] * __fdividef(1.0F, weight));
        } else {
          through.v[e] += reciprocal * w[e] * douts.v[e] - pull * values.v[e];
        }
      }
      store_once_raw(p.dx + start + i * kN, repack(through));
    }
  }
  __shared__ float total[kRows > 1 ? 32 * kPacks * kN : 1];
  float* partial = p.dw_partials + static_cast<std::int64_t>(blockIdx.x) * p.width;
#pragma unroll 1
  for (int turn = 0; turn < kRows; ++turn) {
    if (team == turn) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int i = lane + k * kLanes;
        if (i >= packs) continue;
#pragma unroll
        for (int e = 0; e < kN; ++e) {
          const float sum = dw[k][e] + (turn > 0 ? total[i * kN + e] : 0.0F);
          if (turn < kRows - 1) {
            total[i * kN + e] = sum;
          } else {
            partial[i * kN + e] = kFrom == From::Output ? sum / held(p.w[i * kN + e]) : sum;
          }
        }
      }
    }
    __syncthreads();
  }
}

/// A block a row, in two passes.
template <typename T, From kFrom>
__global__ void __launch_bounds__(kGenericThreads) backward_any(Backward<T> p) {
  __shared__ float shared[32];
  const std::int64_t row = blockIdx.x, start = row * p.width;
  float product = 0;
  for (std::int64_t j = threadIdx.x; j < p.width; j += kGenericThreads) {
    const float t = to_float(p.dy[start + j]) * to_float(p.x[start + j]);
    product += kFrom == From::Output ? t : t * p.w[j];
  }
  product = block_reduce(product, Sum{}, shared) / static_cast<float>(p.width);
  const float reciprocal = p.rstd[row];
  const float pull =
      kFrom == From::Output ? reciprocal * product : reciprocal * reciprocal * reciprocal * product;
  for (std::int64_t j = threadIdx.x; j < p.width; j += kGenericThreads) {
    const float through = p.dh != nullptr ? to_float(p.dh[start + j]) : 0.0F;
    const float weight = kFrom == From::Output ? held(p.w[j]) : p.w[j];
    const float value = kFrom == From::Output ? to_float(p.x[start + j]) / weight : to_float(p.x[start + j]);
    p.dx[start + j] =
        from_float<T>(through + (reciprocal * weight * to_float(p.dy[start + j]) - pull * value));
  }
}

/// The rows of a block are blockIdx.x, blockIdx.x + gridDim.x, ...; a thread has one column.
template <typename T, From kFrom>
__global__ void __launch_bounds__(kGenericThreads) weight_partials_any(Backward<T> p) {
  const std::int64_t column = static_cast<std::int64_t>(blockIdx.y) * kGenericThreads + threadIdx.x;
  if (column >= p.width) return;
  float sum = 0;
#pragma unroll 4
  for (std::int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
    const float t = to_float(p.dy[row * p.width + column]) * to_float(p.x[row * p.width + column]);
    sum += kFrom == From::Output ? t : t * p.rstd[row];
  }
  if constexpr (kFrom == From::Output) sum /= held(p.w[column]);
  p.dw_partials[static_cast<std::int64_t>(blockIdx.x) * p.width + column] = sum;
}

template <typename T>
void launch_forward(cudaStream_t stream, const char* op, const Forward<T>& p) {
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

/// The most blocks of a backward, for its partials: four a multiprocessor is what the registers allow.
std::int64_t most_blocks(int multiprocessors) { return std::int64_t{4} * multiprocessors; }

template <From kFrom, typename T>
void launch_backward(cudaStream_t stream, const char* op, float* dw, std::int64_t most,
                     const Backward<T>& p) {
  if (p.rows == 0 || p.width == 0) return;
  const bool aligned = packs<T>(p.x, p.width) && packs<T>(p.dy, p.width) && packs<T>(p.dx, p.width) &&
                       packs<T>(p.dh, p.width) && packs<float>(p.w, p.width);
  std::int64_t blocks = 0;
  const bool done =
      aligned && for_row_class(p.width / kPack<T>, [&](auto c) {
        using Class = decltype(c);
        const std::int64_t needed = blocks_for(p.rows, 4 / Class::warps);
        const std::int64_t resident = Class::packs <= 4 ? most : most / 2;
        blocks = needed < resident ? needed : resident;
        const auto grid = static_cast<unsigned>(blocks);
        backward_packed<T, Class::packs, Class::warps, kFrom><<<grid, kBackwardThreads, 0, stream>>>(p);
      });
  if (!done) {
    backward_any<T, kFrom><<<blocks_for(p.rows, 1), kGenericThreads, 0, stream>>>(p);
    blocks = p.rows < most ? p.rows : most;
    const dim3 grid(static_cast<unsigned>(blocks), blocks_for(p.width, kGenericThreads));
    weight_partials_any<T, kFrom><<<grid, kGenericThreads, 0, stream>>>(p);
  }
  check_launch(op);
  add_column_sums(op, {dw, p.dw_partials, blocks, p.width, p.width}, stream);
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

void CudaBackend::rms_norm_backward(View dx, View dw_accumulate, ConstView dy, ConstView x, ConstView w,
                                    ConstView rstd, const NormShape& s) {
  const char* op = "rms_norm_backward";
  const std::int64_t n = s.rows * s.width, most = most_blocks(multiprocessors_);
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_backward<From::Input, T>(
        stream_, op, output<float>(op, "dw", dw_accumulate, s.width), most,
        {output<T>(op, "dx", dx, n), scratch_of<float>(most * s.width), nullptr, input<T>(op, "dy", dy, n),
         input<T>(op, "x", x, n), input<float>(op, "w", w, s.width), input<float>(op, "rstd", rstd, s.rows),
         s.rows, s.width});
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

void CudaBackend::add_rms_norm_backward(View dx, View dw_accumulate, ConstView dh, ConstView dy, ConstView h,
                                        ConstView w, ConstView rstd, const NormShape& s) {
  const char* op = "add_rms_norm_backward";
  const std::int64_t n = s.rows * s.width, most = most_blocks(multiprocessors_);
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_backward<From::Input, T>(
        stream_, op, output<float>(op, "dw", dw_accumulate, s.width), most,
        {output<T>(op, "dx", dx, n), scratch_of<float>(most * s.width), optional_input<T>(op, "dh", dh, n),
         input<T>(op, "dy", dy, n), input<T>(op, "h", h, n), input<float>(op, "w", w, s.width),
         input<float>(op, "rstd", rstd, s.rows), s.rows, s.width});
  });
}

void CudaBackend::rms_norm_backward_from_output(View dx, View dw_accumulate, ConstView dh, ConstView dy,
                                                ConstView y, ConstView w, ConstView rstd,
                                                const NormShape& s) {
  const char* op = "rms_norm_backward_from_output";
  const std::int64_t n = s.rows * s.width, most = most_blocks(multiprocessors_);
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_backward<From::Output, T>(
        stream_, op, output<float>(op, "dw", dw_accumulate, s.width), most,
        {output<T>(op, "dx", dx, n), scratch_of<float>(most * s.width), optional_input<T>(op, "dh", dh, n),
         input<T>(op, "dy", dy, n), input<T>(op, "y", y, n), input<float>(op, "w", w, s.width),
         input<float>(op, "rstd", rstd, s.rows), s.rows, s.width});
  });
}

}  // namespace fathom::cuda
