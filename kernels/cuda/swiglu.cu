// SwiGLU (Shazeer 2020): h = silu(g) u. With p = sigmoid(g): dg = dh u p (1 + g (1 - p)), du = dh g p.
// Where h was kept and u was not, u = h / silu(g). And h = silu(z), z = x + bias: dx = dh p (1 + z (1 - p)),
// dbias = the sum of dx over rows.
#include <type_traits>

#include "kernels/cuda/check.h"
#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/order.cuh"
#include "kernels/cuda/device/raw_pack.cuh"
#include "kernels/cuda/device/sigmoid.cuh"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;  // packs of each operand in flight in a thread

/// Where pack i of [rows, hidden] lies in [rows, 2 hidden]. Index: 32 bits where they hold all packs, since
/// the division would otherwise cost more than the arithmetic.
template <typename Index>
__device__ __forceinline__ std::int64_t in_pairs(Index i, Index packs_per_row, int pack) {
  const Index row = i / packs_per_row;
  return (static_cast<std::int64_t>(i) + static_cast<std::int64_t>(row) * packs_per_row) * pack;
}

/// What silu(gate) counts as where h must tell up.
__device__ __forceinline__ float held(float silu) {
  return fabsf(silu) < kLeastSilu ? copysignf(kLeastSilu, silu) : silu;
}

/// Where h goes: rows of its own, up's place, or up's place in another tensor, which wants the gate as well.
enum class Place : std::uint8_t { Own, OverUp, BesideGate };

/// Reads gate_up, writes h: 3 * rows * hidden elements, and the gate where it is wanted.
template <typename T, int kN, typename Index, Place kPlace>
__global__ void __launch_bounds__(kThreads)
    swiglu_forward_kernel(T* h, const T* gate_up, Index packs, Index packs_per_row) {
  using P = Pack<T, kN>;
  const std::int64_t first =
      static_cast<std::int64_t>(last_part_first()) * (kThreads * kUnroll) + threadIdx.x;
  const std::int64_t hidden = static_cast<std::int64_t>(packs_per_row) * kN;
  P gate[kUnroll], up[kUnroll];
  std::int64_t at[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const std::int64_t i = first + k * kThreads;
    if (i >= packs) continue;
    at[k] = in_pairs(static_cast<Index>(i), packs_per_row, kN);
    gate[k] = P::load(gate_up + at[k]);
    up[k] = P::load(gate_up + at[k] + hidden);
  }
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const std::int64_t i = first + k * kThreads;
    if (i >= packs) continue;
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      // Of rows of their own nothing is computed backwards.
      const bool quick = kPlace == Place::Own && std::is_same_v<T, bf16>;
      const float silu = quick ? quick_silu(gate[k].v[e]) : gate[k].v[e] * fast_sigmoid(gate[k].v[e]);
      up[k].v[e] *= kPlace == Place::Own ? silu : held(silu);
    }
    up[k].store_once(kPlace == Place::Own ? h + i * kN : h + at[k] + hidden);
    if constexpr (kPlace == Place::BesideGate) gate[k].store_once(h + at[k]);
  }
}

/// Reads dh and gate_up, or gate and h, writes dgate_up: 5 * rows * hidden elements.
template <typename T, int kN, typename Index, bool kFromOutput>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(T* dgate_up, const T* dh, const T* gate_up, Index packs, Index packs_per_row) {
  using P = Pack<T, kN>;
  const std::int64_t first =
      static_cast<std::int64_t>(last_part_first()) * (kThreads * kUnroll) + threadIdx.x;
  const std::int64_t hidden = static_cast<std::int64_t>(packs_per_row) * kN;
  P gate[kUnroll], up[kUnroll], d[kUnroll];
  std::int64_t at[kUnroll];
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const std::int64_t i = first + k * kThreads;
    if (i >= packs) continue;
    at[k] = in_pairs(static_cast<Index>(i), packs_per_row, kN);
    gate[k] = P::load_once(gate_up + at[k]);
    up[k] = P::load_once(gate_up + at[k] + hidden);
    d[k] = P::load(dh + i * kN);
  }
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const std::int64_t i = first + k * kThreads;
    if (i >= packs) continue;
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      const float p = fast_sigmoid(gate[k].v[e]), silu = gate[k].v[e] * p;
      const float u = kFromOutput ? __fdividef(up[k].v[e], held(silu)) : up[k].v[e];
      gate[k].v[e] = d[k].v[e] * u * (p + silu * (1.0F - p));
      up[k].v[e] = d[k].v[e] * silu;
    }
    gate[k].store_once(dgate_up + at[k]);
    up[k].store_once(dgate_up + at[k] + hidden);
  }
}

// The bias kernels: a warp has 32 packs of columns and walks rows, kWarps of them side by side in a block.
constexpr int kWarps = 8;
constexpr int kAhead = 4;
constexpr std::int64_t kMostRowBlocks = 256;  // the partial sums of dbias

template <typename T>
struct BiasSilu {
  T* out;           // h, or dx
  float* partials;  // backward: [gridDim.x, width]
  const T* dh;      // backward
  const T* x;
  const float* bias;
  std::int64_t rows;
  std::int64_t width;
};

/// Forward: reads x, writes h: 2 * rows * width elements. Backward: reads dh and x, writes dx: 3 * rows *
/// width. A warp asks for kAhead rows before it computes the first.
template <typename T, int kN, bool kBackward>
__global__ void __launch_bounds__(32 * kWarps) bias_silu_kernel(BiasSilu<T> p) {
  using Raw = RawPack<T, kN>;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.y) * 32 + lane) * kN;
  const bool inside = column < p.width;
  float bias[kN], sums[kN] = {};
#pragma unroll
  for (int e = 0; e < kN; ++e) bias[e] = inside ? p.bias[column + e] : 0.0F;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kWarps * kAhead;
  for (std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kWarps * kAhead + warp;
       inside && first < p.rows; first += step) {
    Raw x[kAhead], d[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const std::int64_t row = first + u * kWarps;
      if (row >= p.rows) continue;
      x[u] = Raw::load(p.x + row * p.width + column);
      if constexpr (kBackward) d[u] = Raw::load(p.dh + row * p.width + column);
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const std::int64_t row = first + u * kWarps;
      if (row >= p.rows) continue;
      Pack<T, kN> values = x[u].values();
      [[maybe_unused]] Pack<T, kN> gradient;
      if constexpr (kBackward) gradient = d[u].values();
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        const float z = values.v[e] + bias[e], s = fast_sigmoid(z);
        values.v[e] = z * s;
        if constexpr (kBackward) {
          values.v[e] = gradient.v[e] * (s + z * s * (1.0F - s));
          sums[e] += values.v[e];
        }
      }
      Raw::of(values).store(p.out + row * p.width + column);
    }
  }
  if constexpr (kBackward) {
    __shared__ float shared[kWarps][32][kN];
#pragma unroll
    for (int e = 0; e < kN; ++e) shared[warp][lane][e] = sums[e];
    __syncthreads();
    if (warp != 0 || !inside) return;
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      float total = sums[e];
#pragma unroll
      for (int other = 1; other < kWarps; ++other) total += shared[other][lane][e];
      p.partials[static_cast<std::int64_t>(blockIdx.x) * p.width + column + e] = total;
    }
  }
}

/// Calls body(pack size, index type) for [rows, hidden] in packs of `pack` elements when `packed`, else in
/// elements.
template <typename T, typename Body>
void for_packs(bool packed, std::int64_t n, Body&& body) {
  constexpr std::int64_t kMost32 = (std::int64_t{1} << 32) - 1;
  const auto with_index = [&](auto pack) {
    if (n / pack.value <= kMost32) {
      body(pack, std::uint32_t{});
    } else {
      body(pack, std::int64_t{});
    }
  };
  if (packed) {
    with_index(std::integral_constant<int, kPack<T>>{});
  } else {
    with_index(std::integral_constant<int, 1>{});
  }
}

template <Place kPlace, typename T>
void launch_swiglu_forward(const char* op, T* to, const T* from, std::int64_t rows, std::int64_t hidden,
                           cudaStream_t stream) {
  const std::int64_t n = rows * hidden;
  if (n == 0) return;
  for_packs<T>(packs<T>(to, hidden) && packs<T>(from, hidden), n, [&](auto pack, auto index) {
    using Index = decltype(index);
    constexpr int kN = decltype(pack)::value;
    swiglu_forward_kernel<T, kN, Index, kPlace>
        <<<blocks_for(n / kN, kThreads * kUnroll), kThreads, 0, stream>>>(
            to, from, static_cast<Index>(n / kN), static_cast<Index>(hidden / kN));
  });
  check_launch(op);
}

template <bool kFromOutput, typename T>
void launch_swiglu_backward(const char* op, T* to, const T* d, const T* from, std::int64_t rows,
                            std::int64_t hidden, cudaStream_t stream) {
  const std::int64_t n = rows * hidden;
  if (n == 0) return;
  const bool packed = packs<T>(to, hidden) && packs<T>(d, hidden) && packs<T>(from, hidden);
  for_packs<T>(packed, n, [&](auto pack, auto index) {
    using Index = decltype(index);
    constexpr int kN = decltype(pack)::value;
    swiglu_backward_kernel<T, kN, Index, kFromOutput>
        <<<blocks_for(n / kN, kThreads * kUnroll), kThreads, 0, stream>>>(
            to, d, from, static_cast<Index>(n / kN), static_cast<Index>(hidden / kN));
  });
  check_launch(op);
}

/// Returns the number of partial sums that a backward leaves.
template <bool kBackward, typename T>
std::int64_t launch_bias_silu(cudaStream_t stream, const char* op, const BiasSilu<T>& p) {
  if (p.rows == 0 || p.width == 0) return 0;
  const bool packed = packs<T>(p.x, p.width) && packs<T>(p.out, p.width) && packs<T>(p.dh, p.width);
  const std::int64_t needed = blocks_for(p.rows, kWarps * kAhead);
  const std::int64_t blocks = kBackward && needed > kMostRowBlocks ? kMostRowBlocks : needed;
  const std::int64_t columns = 32 * (packed ? kPack<T> : 1);
  const dim3 grid(static_cast<unsigned>(blocks), blocks_for(p.width, columns));
  if (packed) {
    bias_silu_kernel<T, kPack<T>, kBackward><<<grid, 32 * kWarps, 0, stream>>>(p);
  } else {
    bias_silu_kernel<T, 1, kBackward><<<grid, 32 * kWarps, 0, stream>>>(p);
  }
  check_launch(op);
  return blocks;
}

}  // namespace

void CudaBackend::swiglu_forward(View h, ConstView gate_up, std::int64_t rows, std::int64_t hidden) {
  const char* op = "swiglu_forward";
  const std::int64_t n = rows * hidden;
  for_compute_type(op, h.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_swiglu_forward<Place::Own>(op, output<T>(op, "h", h, n), input<T>(op, "gate_up", gate_up, 2 * n),
                                      rows, hidden, stream_);
  });
}

void CudaBackend::swiglu_backward(View dgate_up, ConstView dh, ConstView gate_up, std::int64_t rows,
                                  std::int64_t hidden) {
  const char* op = "swiglu_backward";
  const std::int64_t n = rows * hidden;
  for_compute_type(op, dgate_up.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_swiglu_backward<false>(op, output<T>(op, "dgate_up", dgate_up, 2 * n), input<T>(op, "dh", dh, n),
                                  input<T>(op, "gate_up", gate_up, 2 * n), rows, hidden, stream_);
  });
}

void CudaBackend::swiglu_forward_beside_gate(View gate_h, ConstView gate_up, std::int64_t rows,
                                             std::int64_t hidden) {
  const char* op = "swiglu_forward_beside_gate";
  const std::int64_t n = 2 * rows * hidden;
  for_compute_type(op, gate_h.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>(op, "gate_h", gate_h, n);
    const T* from = input<T>(op, "gate_up", gate_up, n);
    if (to == from) {
      launch_swiglu_forward<Place::OverUp>(op, to, from, rows, hidden, stream_);
    } else {
      launch_swiglu_forward<Place::BesideGate>(op, to, from, rows, hidden, stream_);
    }
  });
}

void CudaBackend::swiglu_backward_from_output(View dgate_up, ConstView dh, ConstView gate_h,
                                              std::int64_t rows, std::int64_t hidden) {
  const char* op = "swiglu_backward_from_output";
  const std::int64_t n = rows * hidden;
  for_compute_type(op, dgate_up.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_swiglu_backward<true>(op, output<T>(op, "dgate_up", dgate_up, 2 * n), input<T>(op, "dh", dh, n),
                                 input<T>(op, "gate_h", gate_h, 2 * n), rows, hidden, stream_);
  });
}

void CudaBackend::bias_silu_forward(View h, ConstView x, ConstView bias, std::int64_t rows,
                                    std::int64_t width) {
  const char* op = "bias_silu_forward";
  const std::int64_t n = rows * width;
  for_compute_type(op, h.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch_bias_silu<false, T>(stream_, op,
                               {output<T>(op, "h", h, n), nullptr, nullptr, input<T>(op, "x", x, n),
                                input<float>(op, "bias", bias, width), rows, width});
  });
}

void CudaBackend::bias_silu_backward(View dx, View dbias_accumulate, ConstView dh, ConstView x,
                                     ConstView bias, std::int64_t rows, std::int64_t width) {
  const char* op = "bias_silu_backward";
  const std::int64_t n = rows * width;
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto* dbias = output<float>(op, "dbias", dbias_accumulate, width);
    auto* partials = scratch_of<float>(kMostRowBlocks * width);
    const std::int64_t count = launch_bias_silu<true, T>(
        stream_, op,
        {output<T>(op, "dx", dx, n), partials, input<T>(op, "dh", dh, n), input<T>(op, "x", x, n),
         input<float>(op, "bias", bias, width), rows, width});
    add_column_sums(op, {dbias, partials, count, width, width}, stream_);
  });
}

}  // namespace fathom::cuda
