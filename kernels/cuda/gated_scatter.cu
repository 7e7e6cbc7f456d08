// The routed residual (Raposo et al. 2024, eq. 1): y = x, and y[i] += g(r[i]) f for the kept rows i.
#include <cuda_runtime.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/raw_pack.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/search.cuh"
#include "kernels/cuda/device/sigmoid.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 4;  // packs of each operand that a lane loads before it uses the first

struct Gate {
  float value, slope;
};

__device__ __forceinline__ Gate gate_of(float r, GateKind kind) {
  if (kind == GateKind::Sigmoid) {
    const float g = sigmoid(r);
    return {g, g * sigmoid(-r)};
  }
  if (kind == GateKind::Tanh) {
    const float g = tanhf(r);
    return {g, 1.0F - g * g};
  }
  return {r, 1.0F};
}

template <typename T>
struct Scatter {
  T* y;        // [source_rows, width]
  const T* x;  // likewise; may be y
  const T* f;  // [rows, width]
  const float* r;
  const std::int32_t* indices;
  GateKind gate;
  GatherShape shape;
};

template <typename T>
struct ScatterBackward {
  T* df;        // [rows, width]
  float* dr;    // [source_rows]
  const T* dy;  // [source_rows, width]
  const T* f;   // [rows, width]
  const float* r;
  const std::int32_t* indices;
  GateKind gate;
  GatherShape shape;
};

/// The indices are trusted to be rows of y and r, here and in the backward: those that a selection wrote. An
/// index out of range, for which the gather of the same rows gives zeros, would read and write outside.
///
/// A warp a row. In place: a warp a kept row; traffic: a read of f, a read and a write of the kept rows.
/// Otherwise: a warp a source row, which looks itself up among the (ascending) indices; traffic: a read of x
/// and f, a write of y. What does not wait for the index is loaded before it.
template <typename T, int N, bool kInPlace>
__global__ void __launch_bounds__(kThreads) scatter_kernel(Scatter<T> a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t item = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, width = a.shape.width;
  if (item >= (kInPlace ? a.shape.rows : a.shape.source_rows)) return;
  RawPack<T, N> x[kInFlight], f[kInFlight];
  const auto load = [width](RawPack<T, N>(&to)[kInFlight], const T* from, std::int64_t begin) {
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t column = begin + 32 * N * u;
      if (column < width) to[u] = RawPack<T, N>::load(from + column);
    }
  };
  std::int64_t row = item, position = item;
  bool kept = true;
  if constexpr (kInPlace) {
    load(f, a.f + item * width, lane * N);
    row = a.indices[item];
  } else {
    load(x, a.x + item * width, lane * N);
    position = warp_lower_bound(a.indices, a.shape.rows, static_cast<std::int32_t>(row));
    kept = position < a.shape.rows && a.indices[position] == row;
  }
  const float score = kept ? a.r[row] : 0.0F;
  const T* from = a.x + row * width;
  const T* added = a.f + position * width;
  T* to = a.y + row * width;
  if (kInPlace) {  // beside the score: the gate waits for it, and no load is to wait for the gate
    load(x, from, lane * N);
  } else if (kept) {
    load(f, added, lane * N);
  }
  const float gate = kept ? gate_of(score, a.gate).value : 0.0F;
  for (std::int64_t begin = lane * N; begin < width; begin += 32 * N * kInFlight) {
    if (begin != lane * N) {
      load(x, from, begin);
      if (kept) load(f, added, begin);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t column = begin + 32 * N * u;
      if (column >= width) continue;
      if (kept) {
        Pack<T, N> sum = x[u].values();
        const Pack<T, N> addend = f[u].values();
#pragma unroll
        for (int i = 0; i < N; ++i) sum.v[i] = fmaf(gate, addend.v[i], sum.v[i]);
        x[u] = RawPack<T, N>::of(sum);
      }
      x[u].store(to + column);
    }
  }
}

/// A warp a kept row. Traffic: a read of the kept rows of dy and of f, a write of df.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) scatter_backward_kernel(ScatterBackward<T> a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t item = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32, width = a.shape.width;
  if (item >= a.shape.rows) return;
  const T* f = a.f + item * width;
  T* df = a.df + item * width;
  RawPack<T, N> d[kInFlight], value[kInFlight];
  const auto load = [width](RawPack<T, N>(&to)[kInFlight], const T* from, std::int64_t begin) {
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t column = begin + 32 * N * u;
      if (column < width) to[u] = RawPack<T, N>::load(from + column);
    }
  };
  load(value, f, lane * N);  // does not wait for the index
  const std::int64_t row = a.indices[item];
  const T* dy = a.dy + row * width;
  load(d, dy, lane * N);
  const float before = a.dr[row];  // neither does its read wait for the product
  const Gate gate = gate_of(a.r[row], a.gate);
  float product = 0.0F;
  for (std::int64_t begin = lane * N; begin < width; begin += 32 * N * kInFlight) {
    if (begin != lane * N) {
      load(value, f, begin);
      load(d, dy, begin);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t column = begin + 32 * N * u;
      if (column >= width) continue;
      Pack<T, N> gradient = d[u].values();
      const Pack<T, N> values = value[u].values();
#pragma unroll
      for (int i = 0; i < N; ++i) {
        product = fmaf(gradient.v[i], values.v[i], product);
        gradient.v[i] *= gate.value;
      }
      RawPack<T, N>::of(gradient).store(df + column);
    }
  }
  product = warp_reduce(product, Sum{});
  if (lane == 0) a.dr[row] = before + product * gate.slope;
}

template <typename T, int N>
void launch_scatter(const Scatter<T>& a, cudaStream_t stream) {
  if (a.y == a.x) {
    if (a.shape.rows == 0) return;
    scatter_kernel<T, N, true><<<blocks_for(a.shape.rows, kWarps), kThreads, 0, stream>>>(a);
  } else {
    scatter_kernel<T, N, false><<<blocks_for(a.shape.source_rows, kWarps), kThreads, 0, stream>>>(a);
  }
}

}  // namespace

void CudaBackend::gated_scatter_forward(View y, ConstView x, ConstView f, ConstView r, ConstView indices,
                                        GateKind gate, const GatherShape& s) {
  const char* op = "gated_scatter_forward";
  const auto* kept = input<std::int32_t>(op, "indices", indices, s.rows);
  for_compute_type(op, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Scatter<T> a{output<T>(op, "y", y, s.source_rows * s.width),
                       input<T>(op, "x", x, s.source_rows * s.width),
                       input<T>(op, "f", f, s.rows * s.width),
                       input<float>(op, "r", r, s.source_rows),
                       kept,
                       gate,
                       s};
    if (s.source_rows == 0 || s.width == 0) return;
    if (packs<T>(a.y, s.width) && packs<T>(a.x, s.width) && packs<T>(a.f, s.width)) {
      launch_scatter<T, kPack<T>>(a, stream());
    } else {
      launch_scatter<T, 1>(a, stream());
    }
    check_launch(op);
  });
}

void CudaBackend::gated_scatter_backward(View df, View dr_accumulate, ConstView dy, ConstView f, ConstView r,
                                         ConstView indices, GateKind gate, const GatherShape& s) {
  const char* op = "gated_scatter_backward";
  const auto* kept = input<std::int32_t>(op, "indices", indices, s.rows);
  for_compute_type(op, df.dtype, [&](auto zero) {
    using T = decltype(zero);
    const ScatterBackward<T> a{output<T>(op, "df", df, s.rows * s.width),
                               output<float>(op, "dr", dr_accumulate, s.source_rows),
                               input<T>(op, "dy", dy, s.source_rows * s.width),
                               input<T>(op, "f", f, s.rows * s.width),
                               input<float>(op, "r", r, s.source_rows),
                               kept,
                               gate,
                               s};
    if (s.rows == 0 || s.width == 0) return;
    const unsigned blocks = blocks_for(s.rows, kWarps);
    if (packs<T>(a.df, s.width) && packs<T>(a.dy, s.width) && packs<T>(a.f, s.width)) {
      scatter_backward_kernel<T, kPack<T>><<<blocks, kThreads, 0, stream()>>>(a);
    } else {
      scatter_backward_kernel<T, 1><<<blocks, kThreads, 0, stream()>>>(a);
    }
    check_launch(op);
  });
}

}  // namespace fathom::cuda
