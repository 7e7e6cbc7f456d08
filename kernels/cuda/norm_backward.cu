// RMSNorm's backward, from its input or its output: the formulas stand in norm.cu.
//
// Every warp (four, where rows are wide) walks over rows with its part of dw in registers. While it computes
// one row, the next ones are on their way to shared memory, where each thread finds the packs that it asked
// for itself: some 100 KB of a multiprocessor's loads are under way at any time. The L1 cache and shared
// memory, through which each pack goes twice, are what is busy next: so weights do not come out of them twice
// a row, and lie there so that neighbouring lanes read neighbouring words. A block adds up its warps' dw in
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
  int stages;  // rows in shared memory, of each warp or team of warps: as many as there is room for
  int staged;  // operands there: x and dy, and dh where it is there and has room
};

/// What a backward reads beside dy: the norm's input, or its output.
enum class From : std::uint8_t { Input, Output };

constexpr int kGenericThreads = 256;

constexpr int kMostStages = 4;
/// Of how many elements of a row a lane has room for the weights, in a kernel of so many registers a thread.
constexpr int most_held(int registers) { return registers <= 64 ? 8 : registers <= 128 ? 24 : 48; }

/// How a row class shares a multiprocessor: 16 warps where a lane has up to four packs, else eight; a team of
/// four warps is a block, since it meets at the block's barrier.
template <int kPacks, int kWarps>
struct Shares {
  static constexpr int threads = kWarps > 1 ? 128 : kPacks <= 4 ? 512 : 256;
  static constexpr int blocks = kWarps > 1 ? (kPacks <= 4 ? 4 : 2) : kPacks == 1 ? 2 : 1;
  static constexpr int lanes = 32 * kWarps;
  /// How many packs every lane has, since a narrower row has a lesser class (for_row_class).
  static constexpr int sure = kWarps > 1 ? kPacks / 2 : kPacks <= 4 ? kPacks - 1 : kPacks - 2;
  static constexpr int operand_bytes = 16 * kPacks * threads;
  /// Where weights are: in a lane's registers; else in shared memory, where warps share one copy; else they
  /// are loaded for each row.
  template <typename T>
  static constexpr bool holds = kPacks* kPack<T> <= most_held(65536 / (threads * blocks));
  static constexpr bool beside = kWarps == 1;
};

/// A row's worth of floats in shared memory, by fours, those of neighbouring lanes side by side.
template <int kN, int kLanes>
struct LaneFloats {
  float4* fours;

  __device__ __forceinline__ void set(int k, int lane, const float (&v)[kN]) const {
#pragma unroll
    for (int e = 0; e < kN; e += 4)
      fours[(k * (kN / 4) + e / 4) * kLanes + lane] = make_float4(v[e], v[e + 1], v[e + 2], v[e + 3]);
  }
  __device__ __forceinline__ void get(float (&v)[kN], int k, int lane) const {
#pragma unroll
    for (int e = 0; e < kN; e += 4) {
      const float4 four = fours[(k * (kN / 4) + e / 4) * kLanes + lane];
      v[e] = four.x, v[e + 1] = four.y, v[e + 2] = four.z, v[e + 3] = four.w;
    }
  }
};

/// What the weights of a pack count as.
template <From kFrom, int kN>
__device__ __forceinline__ void load_weights(float (&w)[kN], const float* from) {
  load_floats(w, from);
  if constexpr (kFrom == From::Output) {
#pragma unroll
    for (int e = 0; e < kN; ++e) w[e] = held_weight(w[e]);
  }
}

/// Until the oldest of `ahead` + 1 groups of copies is there; ahead < kMostStages.
__device__ __forceinline__ void wait_for_oldest(int ahead) {
  if (ahead == 3) {
    wait_copies<3>();
  } else if (ahead == 2) {
    wait_copies<2>();
  } else if (ahead == 1) {
    wait_copies<1>();
  } else {
    wait_copies<0>();
  }
}

template <int kWarps>
__device__ __forceinline__ float row_sum(float x, float* shared) {
  return kWarps == 1 ? warp_reduce(x, Sum{}) : block_reduce(x, Sum{}, shared);
}

/// Reads dy and x (and dh), writes dx: 3 or 4 * rows * width elements.
template <typename T, int kPacks, int kWarps, From kFrom>
__global__ void __launch_bounds__((Shares<kPacks, kWarps>::threads), (Shares<kPacks, kWarps>::blocks))
    backward_packed(Backward<T> p) {
  using Share = Shares<kPacks, kWarps>;
  constexpr int kN = kPack<T>, kThreads = Share::threads, kLanes = Share::lanes, kRows = kThreads / kLanes;
  constexpr int kOperand = kPacks * kThreads;  // packs
  constexpr bool kOutput = kFrom == From::Output, kHold = Share::template holds<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ float shared[32];
  uint4* const mine = reinterpret_cast<uint4*>(memory) + threadIdx.x;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, team = static_cast<int>(threadIdx.x) / kLanes;
  const int packs = static_cast<int>(p.width / kN);
  const int stage_packs = p.staged * kOperand, ahead = p.stages - 1;
  // Rows are counted from the end: the product that wrote dy has just finished there (order.cuh).
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kRows;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kRows + team;
  const std::uint64_t once = policy_of_once();
  const auto has = [&](int k) { return k < Share::sure || lane + k * kLanes < packs; };
  const auto ask_for = [&](std::int64_t number, int stage) {
    if (number < p.rows) {
      const std::int64_t start = (p.rows - 1 - number) * p.width + lane * kN;
      uint4* const to = mine + stage * stage_packs;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        if (!has(k)) continue;
        const int at = k * kLanes * kN;
        copy_async_once(to + k * kThreads, p.x + start + at, once);
        copy_async(to + kOperand + k * kThreads, p.dy + start + at, true);
      }
      if (p.staged == 3) {
#pragma unroll
        for (int k = 0; k < kPacks; ++k) {
          if (!has(k)) continue;
          copy_async_once(to + 2 * kOperand + k * kThreads, p.dh + start + k * kLanes * kN, once);
        }
      }
    }
    commit_copies();
  };
  const auto reciprocal_of = [&](std::int64_t number) {
    return number < p.rows ? p.rstd[p.rows - 1 - number] : 0.0F;
  };
  float next_reciprocal = reciprocal_of(first);
  for (int s = 0; s < ahead; ++s) ask_for(first + s * step, s);
  if (ahead == 0) ask_for(first, 0);
  const LaneFloats<kN, kLanes> weights{
      reinterpret_cast<float4*>(mine - threadIdx.x + p.stages * stage_packs)};
  const LaneFloats<kN, kLanes> inverses{weights.fours + (kHold ? 0 : kPacks * kLanes * (kN / 4))};
  float held[kHold ? kPacks : 1][kN];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = lane + k * kLanes;
    if (i >= packs) continue;
    float w[kN], inverse[kN];
    load_weights<kFrom>(w, p.w + i * kN);
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      inverse[e] = kOutput ? 1.0F / w[e] : 0.0F;
      if constexpr (kHold) held[k][e] = w[e];
    }
    if (!Share::beside || team != 0) continue;
    if constexpr (!kHold) weights.set(k, lane, w);
    if constexpr (kOutput) inverses.set(k, lane, inverse);
  }
  if constexpr (Share::beside) __syncthreads();
  const auto weights_of = [&](float(&w)[kN], int k) {
    if constexpr (kHold) {
#pragma unroll
      for (int e = 0; e < kN; ++e) w[e] = held[k][e];
    } else if constexpr (Share::beside) {
      weights.get(w, k, lane);
    } else {
      load_weights<kFrom>(w, p.w + (lane + k * kLanes) * kN);
    }
  };
  const float per_element = 1.0F / static_cast<float>(p.width);
  float dw[kPacks][kN] = {};
  int stage = 0;
  for (std::int64_t number = first; number < p.rows; number += step) {
    const float reciprocal = next_reciprocal;
    next_reciprocal = reciprocal_of(number + step);
    if (ahead > 0) ask_for(number + ahead * step, stage == 0 ? ahead : stage - 1);
    wait_for_oldest(ahead);
    const uint4* const from = mine + stage * stage_packs;
    uint4 x[kPacks], dy[kPacks];
    float through_norm[kOutput ? 1 : kPacks][kN];  // dy w rstd
    float product = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!has(k)) continue;
      x[k] = from[k * kThreads];
      dy[k] = from[kOperand + k * kThreads];
      const Pack<T> values = unpack<T>(x[k]), douts = unpack<T>(dy[k]);
      if constexpr (kOutput) {
#pragma unroll
        for (int e = 0; e < kN; ++e) {
          product += douts.v[e] * values.v[e];
          dw[k][e] += douts.v[e] * values.v[e];  // of w dw
        }
      } else {
        float w[kN];
        weights_of(w, k);
#pragma unroll
        for (int e = 0; e < kN; ++e) {
          const float scaled = douts.v[e] * reciprocal;
          dw[k][e] += scaled * values.v[e];
          through_norm[k][e] = scaled * w[e];
          product += through_norm[k][e] * values.v[e];
        }
      }
    }
    product = row_sum<kWarps>(product, shared) * per_element;
    const float pull = kOutput ? reciprocal * product : reciprocal * reciprocal * product;
    const std::int64_t start = (p.rows - 1 - number) * p.width + lane * kN;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (!has(k)) continue;
      const int at = k * kLanes * kN;
      const Pack<T> values = unpack<T>(x[k]);
      uint4 beside{};
      if (p.staged == 3) {
        beside = from[2 * kOperand + k * kThreads];
      } else if (p.dh != nullptr) {
        beside = load_once_raw(p.dh + start + at);
      }
      Pack<T> sum = unpack<T>(beside);
      if constexpr (kOutput) {
        const Pack<T> douts = unpack<T>(dy[k]);
        float w[kN], inverse[kN];
        weights_of(w, k);
        if constexpr (Share::beside) {
          inverses.get(inverse, k, lane);
        } else {
#pragma unroll
          for (int e = 0; e < kN; ++e) inverse[e] = __fdividef(1.0F, w[e]);
        }
#pragma unroll
        for (int e = 0; e < kN; ++e)
          sum.v[e] += reciprocal * douts.v[e] * w[e] - pull * values.v[e] * inverse[e];
      } else {
#pragma unroll
        for (int e = 0; e < kN; ++e) sum.v[e] += through_norm[k][e] - pull * values.v[e];
      }
      store_once_raw(p.dx + start + at, repack(sum));
    }
    if (ahead == 0) ask_for(number + step, 0);
    stage = stage < ahead ? stage + 1 : 0;
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
    partial[column] = kOutput ? total / held_weight(p.w[column]) : total;
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
  // Of each block on a multiprocessor: what the system takes, what the kernel declares itself, and weights.
  constexpr std::int64_t kOwnShared = 1024 + 256;
  constexpr std::int64_t kWeightRows =
      Share::beside ? (Share::template holds<T> ? 0 : 1) + (kFrom == From::Output ? 1 : 0) : 0;
  constexpr std::int64_t kWeights = kWeightRows * Class::packs * 16 * Share::lanes * (4 / sizeof(T));
  const std::int64_t room = (most_shared_bytes() + 1024) / Share::blocks - kOwnShared - kWeights;
  p.staged = p.dh != nullptr && 3 * Share::operand_bytes <= room ? 3 : 2;
  const std::int64_t stage = std::int64_t{p.staged} * Share::operand_bytes, stages = room / stage;
  p.stages = static_cast<int>(stages < 1 ? 1 : stages > kMostStages ? kMostStages : stages);
  const std::int64_t needed = blocks_for(p.rows, Share::threads / (32 * Class::warps));
  const std::int64_t resident = std::int64_t{Share::blocks} * multiprocessors;
  const std::int64_t blocks = needed < resident ? needed : resident;
  const LaunchSize size{static_cast<unsigned>(blocks), static_cast<unsigned>(Share::threads),
                        static_cast<std::size_t>(p.stages * stage + kWeights)};
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
         input<float>(op, "rstd", rstd, s.rows), s.rows, s.width, 0, 0});
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
         input<float>(op, "w", w, s.width), input<float>(op, "rstd", rstd, s.rows), s.rows, s.width, 0, 0});
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
         input<float>(op, "w", w, s.width), input<float>(op, "rstd", rstd, s.rows), s.rows, s.width, 0, 0});
  });
}

}  // namespace fathom::cuda
