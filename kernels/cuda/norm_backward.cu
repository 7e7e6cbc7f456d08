// RMSNorm's backward, from its input or its output: the formulas stand in norm.cu.
//
// Every warp (four, where rows are wide) walks over rows with its part of dw in registers. While it computes
// one row, the next is on its way to shared memory, where each thread finds the packs that it asked for
// itself: some 100 KB of a multiprocessor's loads are under way at any time. A block adds up its warps' dw in
// their order, which is one row of the partials. Rows that are wider, or no multiple of 16 bytes, take a
// block and two passes.
#include "kernels/cuda/check.h"
#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/norm_weight.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/row_packs.cuh"

namespace fathom::cuda {

namespace {

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
  int stages;  // rows in shared memory, of each warp or team of warps: 2, or 1 where there is room for no
               // more
};

/// What a backward reads beside dy: the norm's input, or its output.
enum class From : std::uint8_t { Input, Output };

constexpr int kGenericThreads = 256;

/// How a row class shares a multiprocessor: 16 warps where a lane has up to four packs, else eight; a team of
/// four warps is a block, since it meets at the block's barrier.
template <int kPacks, int kWarps>
struct Shares {
  static constexpr int threads = kWarps > 1 ? 128 : kPacks <= 4 ? 512 : 256;
  static constexpr int blocks = kWarps > 1 ? (kPacks <= 4 ? 4 : 2) : kPacks <= 2 ? 2 : 1;
  static constexpr int operand_bytes = 16 * kPacks * threads;
  static constexpr int stage_bytes = 3 * operand_bytes;  // x, dy and dh
};

template <int kWarps>
__device__ __forceinline__ float row_sum(float x, float* shared) {
  return kWarps == 1 ? warp_reduce(x, Sum{}) : block_reduce(x, Sum{}, shared);
}

/// Reads dy and x (and dh), writes dx: 3 or 4 * rows * width elements.
template <typename T, int kPacks, int kWarps, From kFrom>
__global__ void __launch_bounds__((Shares<kPacks, kWarps>::threads), (Shares<kPacks, kWarps>::blocks))
    backward_packed(Backward<T> p) {
  using Share = Shares<kPacks, kWarps>;
  constexpr int kN = kPack<T>, kThreads = Share::threads, kLanes = 32 * kWarps, kRows = kThreads / kLanes;
  constexpr int kOperand = kPacks * kThreads;  // packs
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float shared[32];
  uint4* const mine = reinterpret_cast<uint4*>(memory) + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, team = static_cast<int>(threadIdx.x) / kLanes;
  const int packs = static_cast<int>(p.width / kN);
  // Rows are counted from the end: the product that wrote dy has just finished there (order.cuh).
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kRows;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kRows + team;
  const auto ask_for = [&](std::int64_t number, int stage) {
    if (number < p.rows) {
      const std::int64_t start = (p.rows - 1 - number) * p.width;
      uint4* const to = mine + stage * 3 * kOperand;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int i = lane + k * kLanes;
        if (i >= packs) continue;
        copy_async_once(to + k * kThreads, p.x + start + i * kN);
        copy_async(to + kOperand + k * kThreads, p.dy + start + i * kN, true);
        if (p.dh != nullptr) copy_async_once(to + 2 * kOperand + k * kThreads, p.dh + start + i * kN);
      }
    }
    commit_copies();
  };
  const auto reciprocal_of = [&](std::int64_t number) {
    return number < p.rows ? p.rstd[p.rows - 1 - number] : 0.0F;
  };
  float dw[kPacks][kN] = {};
  int stage = 0;
  float next_reciprocal = reciprocal_of(first);
  ask_for(first, 0);
  for (std::int64_t number = first; number < p.rows; number += step) {
    const float reciprocal = next_reciprocal;
    next_reciprocal = reciprocal_of(number + step);
    if (p.stages == 2) {
      ask_for(number + step, stage ^ 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    const uint4* const from = mine + stage * 3 * kOperand;
    uint4 x[kPacks], dy[kPacks];
    float product = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int i = lane + k * kLanes;
      if (i >= packs) continue;
      x[k] = from[k * kThreads];
      dy[k] = from[kOperand + k * kThreads];
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
    T* const to = p.dx + (p.rows - 1 - number) * p.width;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int i = lane + k * kLanes;
      if (i >= packs) continue;
      float w[kN];
      load_floats(w, p.w + i * kN);
      const Pack<T> values = unpack<T>(x[k]), douts = unpack<T>(dy[k]);
      Pack<T> through = unpack<T>(p.dh != nullptr ? from[2 * kOperand + k * kThreads] : uint4{});
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        if constexpr (kFrom == From::Output) {
          const float weight = held_weight(w[e]);
          through.v[e] += reciprocal * weight * douts.v[e] - pull * (values.v[e] * __fdividef(1.0F, weight));
        } else {
          through.v[e] += reciprocal * w[e] * douts.v[e] - pull * values.v[e];
        }
      }
      store_once_raw(to + i * kN, repack(through));
    }
    if (p.stages == 2) {
      stage ^= 1;
    } else {
      ask_for(number + step, 0);
    }
  }
  wait_copies<0>();
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(memory);  // [kRows, width]: what was staged has been read
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = lane + k * kLanes;
    if (i >= packs) continue;
#pragma unroll
    for (int e = 0; e < kN; e += 4) {
      *reinterpret_cast<float4*>(sums + team * p.width + i * kN + e) =
          make_float4(dw[k][e], dw[k][e + 1], dw[k][e + 2], dw[k][e + 3]);
    }
  }
  __syncthreads();
  float* const partial = p.dw_partials + static_cast<std::int64_t>(blockIdx.x) * p.width;
  for (int column = static_cast<int>(threadIdx.x); column < p.width; column += kThreads) {
    float total = sums[column];
#pragma unroll
    for (int other = 1; other < kRows; ++other) total += sums[other * p.width + column];
    partial[column] = kFrom == From::Output ? total / held_weight(p.w[column]) : total;
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
    const float weight = kFrom == From::Output ? held_weight(p.w[j]) : p.w[j];
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
  if constexpr (kFrom == From::Output) sum /= held_weight(p.w[column]);
  p.dw_partials[static_cast<std::int64_t>(blockIdx.x) * p.width + column] = sum;
}

/// The most blocks of a backward, for its partials.
std::int64_t most_blocks(int multiprocessors) { return std::int64_t{4} * multiprocessors; }

template <typename T, typename Class, From kFrom>
std::int64_t launch_packed(cudaStream_t stream, const char* op, int multiprocessors, Backward<T> p) {
  using Share = Shares<Class::packs, Class::warps>;
  constexpr std::int64_t kOwnShared = 256;
  p.stages = 2 * Share::stage_bytes + kOwnShared <= most_shared_bytes() ? 2 : 1;
  const std::int64_t needed = blocks_for(p.rows, Share::threads / (32 * Class::warps));
  const std::int64_t resident = std::int64_t{Share::blocks} * multiprocessors;
  const std::int64_t blocks = needed < resident ? needed : resident;
  const LaunchSize size{static_cast<unsigned>(blocks), static_cast<unsigned>(Share::threads),
                        static_cast<std::size_t>(p.stages) * Share::stage_bytes};
  launch(op, backward_packed<T, Class::packs, Class::warps, kFrom>, size, stream, p);
  return blocks;
}

template <From kFrom, typename T>
void launch_backward(cudaStream_t stream, const char* op, float* dw, int multiprocessors,
                     const Backward<T>& p) {
  if (p.rows == 0 || p.width == 0) return;
  const bool aligned = packs<T>(p.x, p.width) && packs<T>(p.dy, p.width) && packs<T>(p.dx, p.width) &&
                       packs<T>(p.dh, p.width) && packs<float>(p.w, p.width);
  std::int64_t blocks = 0;
  const bool done = aligned && for_row_class(p.width / kPack<T>, [&](auto c) {
                      blocks = launch_packed<T, decltype(c), kFrom>(stream, op, multiprocessors, p);
                    });
  if (!done) {
    backward_any<T, kFrom><<<blocks_for(p.rows, 1), kGenericThreads, 0, stream>>>(p);
    const std::int64_t most = most_blocks(multiprocessors);
    blocks = p.rows < most ? p.rows : most;
    const dim3 grid(static_cast<unsigned>(blocks), blocks_for(p.width, kGenericThreads));
    weight_partials_any<T, kFrom><<<grid, kGenericThreads, 0, stream>>>(p);
  }
  check_launch(op);
  add_column_sums(op, {dw, p.dw_partials, blocks, p.width, p.width}, stream);
}

}  // namespace

void CudaBackend::rms_norm_backward(View dx, View dw_accumulate, ConstView dy, ConstView x, ConstView w,
                                    ConstView rstd, const NormShape& s) {
  const char* op = "rms_norm_backward";
  const std::int64_t n = s.rows * s.width;
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_backward<From::Input, T>(
        stream_, op, output<float>(op, "dw", dw_accumulate, s.width), multiprocessors_,
        {output<T>(op, "dx", dx, n), scratch_of<float>(most_blocks(multiprocessors_) * s.width), nullptr,
         input<T>(op, "dy", dy, n), input<T>(op, "x", x, n), input<float>(op, "w", w, s.width),
         input<float>(op, "rstd", rstd, s.rows), s.rows, s.width, 2});
  });
}

void CudaBackend::add_rms_norm_backward(View dx, View dw_accumulate, ConstView dh, ConstView dy, ConstView h,
                                        ConstView w, ConstView rstd, const NormShape& s) {
  const char* op = "add_rms_norm_backward";
  const std::int64_t n = s.rows * s.width;
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_backward<From::Input, T>(
        stream_, op, output<float>(op, "dw", dw_accumulate, s.width), multiprocessors_,
        {output<T>(op, "dx", dx, n), scratch_of<float>(most_blocks(multiprocessors_) * s.width),
         optional_input<T>(op, "dh", dh, n), input<T>(op, "dy", dy, n), input<T>(op, "h", h, n),
         input<float>(op, "w", w, s.width), input<float>(op, "rstd", rstd, s.rows), s.rows, s.width, 2});
  });
}

void CudaBackend::rms_norm_backward_from_output(View dx, View dw_accumulate, ConstView dh, ConstView dy,
                                                ConstView y, ConstView w, ConstView rstd,
                                                const NormShape& s) {
  const char* op = "rms_norm_backward_from_output";
  const std::int64_t n = s.rows * s.width;
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_backward<From::Output, T>(
        stream_, op, output<float>(op, "dw", dw_accumulate, s.width), multiprocessors_,
        {output<T>(op, "dx", dx, n), scratch_of<float>(most_blocks(multiprocessors_) * s.width),
         optional_input<T>(op, "dh", dh, n), input<T>(op, "dy", dy, n), input<T>(op, "y", y, n),
         input<float>(op, "w", w, s.width), input<float>(op, "rstd", rstd, s.rows), s.rows, s.width, 2});
  });
}

}  // namespace fathom::cuda
