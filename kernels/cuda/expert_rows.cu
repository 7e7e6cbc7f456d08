// Rows of a stream to the slots of the experts that take them, and the experts' weighted sum back. Every sum
// is one row's own, over the experts in their order: no two warps write to one place.
#include <cuda_runtime.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/gather_rows.cuh"
#include "kernels/cuda/device/raw_pack.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 4;  // packs of each operand that a lane loads before it uses the first

/// indices, rows [E * S]; slots [E * N] is -1 everywhere before. The indices are unique. Traffic: 12 bytes a
/// slot.
__global__ void __launch_bounds__(kThreads)
    slots_kernel(std::int32_t* rows, std::int32_t* slots, const std::int32_t* indices, std::int64_t count,
                 std::int32_t source_rows) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= count) return;
  const std::int32_t at = indices[i];
  rows[i] = at % source_rows;
  slots[at] = static_cast<std::int32_t>(i);
}

template <typename T>
struct Combine {
  T* y;                       // [N, D]
  const T* f;                 // [E * S, D]
  const float* weights;       // [E, N], or null: all 1
  const std::int32_t* slots;  // [E, N]
  ExpertShape shape;
};

/// A warp a row: its lanes look up the slots of 32 experts at a time, and then add one slot's row after the
/// other. Traffic: a read of the rows that are taken, a write of y, and 8 bytes an expert and row.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) combine_kernel(Combine<T> a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, width = a.shape.width;
  if (row >= a.shape.rows) return;
  T* to = a.y + row * width;
  for (std::int64_t begin = 0; begin < width; begin += 32 * N * kInFlight) {
    float sum[kInFlight][N] = {};
    for (std::int64_t first = 0; first < a.shape.experts; first += 32) {
      const bool is_expert = first + lane < a.shape.experts;
      const std::int64_t at = (first + lane) * a.shape.rows + row;
      const std::int32_t slot = is_expert ? a.slots[at] : -1;
      const float weight = slot >= 0 && a.weights != nullptr ? a.weights[at] : 1.0F;
      unsigned left = __ballot_sync(kFullWarp, slot >= 0);
      while (left != 0) {
        const int e = __ffs(static_cast<int>(left)) - 1;
        left &= left - 1;
        const T* from = a.f + std::int64_t{__shfl_sync(kFullWarp, slot, e)} * width;
        const float factor = __shfl_sync(kFullWarp, weight, e);
        RawPack<T, N> f[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          const std::int64_t column = begin + (32 * u + lane) * N;
          if (column < width) f[u] = RawPack<T, N>::load(from + column);
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          if (begin + (32 * u + lane) * N >= width) continue;
          const Pack<T, N> values = f[u].values();
#pragma unroll
          for (int i = 0; i < N; ++i) sum[u][i] = fmaf(factor, values.v[i], sum[u][i]);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t column = begin + (32 * u + lane) * N;
      if (column >= width) continue;
      Pack<T, N> out;
#pragma unroll
      for (int i = 0; i < N; ++i) out.v[i] = sum[u][i];
      out.store(to + column);
    }
  }
}

template <typename T>
void combine(const char* op, const Combine<T>& a, cudaStream_t stream) {
  if (a.shape.rows == 0 || a.shape.width == 0) return;
  const unsigned blocks = blocks_for(a.shape.rows, kWarps);
  if (packs<T>(a.y, a.shape.width) && packs<T>(a.f, a.shape.width)) {
    combine_kernel<T, kPack<T>><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    combine_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(a);
  }
  check_launch(op);
}

template <typename T>
struct CombineBackward {
  T* df;                 // [E * S, D]
  float* dweights;       // [E, N], zero where there is no slot
  const T* dy;           // [N, D]
  const T* f;            // [E * S, D]
  const float* weights;  // [E, N]
  const std::int32_t* rows;
  ExpertShape shape;
};

/// A warp a slot. Traffic: a read of f and of the rows of dy for each slot that has them, a write of df.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) combine_backward_kernel(CombineBackward<T> a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t slot = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, width = a.shape.width;
  if (slot >= a.shape.experts * a.shape.slots) return;
  const std::int64_t row = a.rows[slot];
  const bool taken = row >= 0;
  const std::int64_t at = taken ? slot / a.shape.slots * a.shape.rows + row : 0;
  const float weight = taken ? a.weights[at] : 0.0F;
  const T* dy = a.dy + (taken ? row : 0) * width;
  const T* f = a.f + slot * width;
  T* df = a.df + slot * width;
  float product = 0.0F;
  for (std::int64_t begin = lane * N; begin < width; begin += 32 * N * kInFlight) {
    RawPack<T, N> d[kInFlight], value[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t column = begin + 32 * N * u;
      if (column >= width || !taken) continue;
      d[u] = RawPack<T, N>::load(dy + column);
      value[u] = RawPack<T, N>::load(f + column);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t column = begin + 32 * N * u;
      if (column >= width) continue;
      Pack<T, N> gradient{};
      if (taken) {
        gradient = d[u].values();
        const Pack<T, N> values = value[u].values();
#pragma unroll
        for (int i = 0; i < N; ++i) {
          product = fmaf(gradient.v[i], values.v[i], product);
          gradient.v[i] *= weight;
        }
      }
      RawPack<T, N>::of(gradient).store(df + column);
    }
  }
  product = warp_reduce(product, Sum{});
  if (lane == 0 && taken) a.dweights[at] = product;
}

}  // namespace

void CudaBackend::expert_slots(View rows, View slots, ConstView indices, const ExpertShape& s) {
  const char* op = "expert_slots";
  const std::int64_t count = s.experts * s.slots, all = s.experts * s.rows;
  if (all > 0x7fffffff) fail(op, "E * N", all, 0x7fffffff);
  auto* row_of = output<std::int32_t>(op, "rows", rows, count);
  auto* slot_of = output<std::int32_t>(op, "slots", slots, all);
  const auto* chosen = input<std::int32_t>(op, "indices", indices, count);
  if (all == 0) return;
  check(cudaMemsetAsync(slot_of, 0xff, static_cast<std::size_t>(all) * sizeof(std::int32_t), stream()), op);
  if (count == 0) return;
  slots_kernel<<<blocks_for(count, kThreads), kThreads, 0, stream()>>>(row_of, slot_of, chosen, count,
                                                                       static_cast<std::int32_t>(s.rows));
  check_launch(op);
}

void CudaBackend::expert_gather_forward(View out, ConstView x, ConstView rows, const ExpertShape& s) {
  const char* op = "expert_gather_forward";
  const std::int64_t count = s.experts * s.slots;
  const auto* row_of = input<std::int32_t>(op, "rows", rows, count);
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    gather_rows<T>(op,
                   {output<T>(op, "out", out, count * s.width), input<T>(op, "x", x, s.rows * s.width),
                    row_of, count, s.rows, s.width},
                   stream());
  });
}

void CudaBackend::expert_gather_backward(View dx, ConstView dout, ConstView slots, const ExpertShape& s) {
  const char* op = "expert_gather_backward";
  const auto* slot_of = input<std::int32_t>(op, "slots", slots, s.experts * s.rows);
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    combine<T>(op,
               {output<T>(op, "dx", dx, s.rows * s.width),
                input<T>(op, "dout", dout, s.experts * s.slots * s.width), nullptr, slot_of, s},
               stream());
  });
}

void CudaBackend::expert_combine_forward(View y, ConstView f, ConstView weights, ConstView slots,
                                         const ExpertShape& s) {
  const char* op = "expert_combine_forward";
  const auto* slot_of = input<std::int32_t>(op, "slots", slots, s.experts * s.rows);
  const auto* factors = input<float>(op, "weights", weights, s.experts * s.rows);
  for_compute_type(op, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    combine<T>(op,
               {output<T>(op, "y", y, s.rows * s.width), input<T>(op, "f", f, s.experts * s.slots * s.width),
                factors, slot_of, s},
               stream());
  });
}

void CudaBackend::expert_combine_backward(View df, View dweights, ConstView dy, ConstView f,
                                          ConstView weights, ConstView rows, const ExpertShape& s) {
  const char* op = "expert_combine_backward";
  const std::int64_t count = s.experts * s.slots, all = s.experts * s.rows;
  const auto* row_of = input<std::int32_t>(op, "rows", rows, count);
  for_compute_type(op, df.dtype, [&](auto zero) {
    using T = decltype(zero);
    const CombineBackward<T> a{output<T>(op, "df", df, count * s.width),
                               output<float>(op, "dweights", dweights, all),
                               input<T>(op, "dy", dy, s.rows * s.width),
                               input<T>(op, "f", f, count * s.width),
                               input<float>(op, "weights", weights, all),
                               row_of,
                               s};
    if (all == 0) return;
    check(cudaMemsetAsync(a.dweights, 0, static_cast<std::size_t>(all) * sizeof(float), stream()), op);
    if (count == 0 || s.width == 0) return;
    const unsigned blocks = blocks_for(count, kWarps);
    if (packs<T>(a.df, s.width) && packs<T>(a.dy, s.width) && packs<T>(a.f, s.width)) {
      combine_backward_kernel<T, kPack<T>><<<blocks, kThreads, 0, stream()>>>(a);
    } else {
      combine_backward_kernel<T, 1><<<blocks, kThreads, 0, stream()>>>(a);
    }
    check_launch(op);
  });
}

}  // namespace fathom::cuda
