// r = x . w (+ bias), one scalar a row: routers and the last layer of predictors.
#include "kernels/cuda/check.h"
#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/raw_pack.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 4;                   // rows of a warp at a time
constexpr std::int64_t kMostBlocks = 256;  // of rows in the backward: as many partial sums of dw

/// Reads x once: rows * width elements.
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(float* r, const T* x, const float* w, const float* bias, std::int64_t rows,
                   std::int64_t width) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * kWarps + warp) * kRows;
  if (first >= rows) return;
  float sum[kRows] = {};
  for (std::int64_t column = lane * kN; column < width; column += 32 * kN) {
    Pack<T, kN> from[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i < rows) from[i] = Pack<T, kN>::load(x + (first + i) * width + column);
    }
    float weight[kN];
#pragma unroll
    for (int e = 0; e < kN; ++e) weight[e] = __ldg(w + column + e);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int e = 0; e < kN; ++e) sum[i] += from[i].v[e] * weight[e];
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const float total = warp_reduce(sum[i], Sum{});
    if (lane == 0 && first + i < rows) r[first + i] = total + (bias != nullptr ? *bias : 0.0F);
  }
}

template <typename T>
struct Backward {
  T* dx;            // null: not wanted
  float* partials;  // [gridDim.x, width]
  const float* dr;
  const T* x;
  const float* w;
  std::int64_t rows;
  std::int64_t width;
};

/// A warp owns 32 packs of columns and looks at 32 rows at a time; a row whose dr is exactly 0, as that of a
/// row that no block kept, costs nothing. Of the others: reads x and dx, writes dx: 3 * width elements each.
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads) backward_kernel(Backward<T> b) {
  __shared__ float shared[kWarps][32][kN];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t column = (static_cast<std::int64_t>(blockIdx.y) * 32 + lane) * kN;
  const bool inside = column < b.width;
  float weight[kN], sum[kN] = {};
#pragma unroll
  for (int e = 0; e < kN; ++e) weight[e] = inside ? b.w[column + e] : 0.0F;
  const std::int64_t step = static_cast<std::int64_t>(gridDim.x) * kWarps * 32;
  for (std::int64_t begin = (static_cast<std::int64_t>(blockIdx.x) * kWarps + warp) * 32; begin < b.rows;
       begin += step) {
    const float mine = begin + lane < b.rows ? b.dr[begin + lane] : 0.0F;
    unsigned left = __ballot_sync(kFullWarp, mine != 0.0F);
    while (left != 0) {
      // Some rows at once, so that their loads are under way together.
      int row[kRows];  // -1: none is left
      float d[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        row[u] = __ffs(static_cast<int>(left)) - 1;
        left &= left - 1;
        d[u] = __shfl_sync(kFullWarp, mine, row[u] & 31);
      }
      if (!inside) continue;
      RawPack<T, kN> x[kRows], dx[kRows];
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if (row[u] < 0) continue;
        const std::int64_t at = (begin + row[u]) * b.width + column;
        x[u] = RawPack<T, kN>::load(b.x + at);
        if (b.dx != nullptr) dx[u] = RawPack<T, kN>::load(b.dx + at);
      }
#pragma unroll
      for (int u = 0; u < kRows; ++u) {
        if (row[u] < 0) continue;
        const Pack<T, kN> values = x[u].values();
#pragma unroll
        for (int e = 0; e < kN; ++e) sum[e] += d[u] * values.v[e];
        if (b.dx == nullptr) continue;
        Pack<T, kN> gradient = dx[u].values();
#pragma unroll
        for (int e = 0; e < kN; ++e) gradient.v[e] += d[u] * weight[e];
        RawPack<T, kN>::of(gradient).store(b.dx + (begin + row[u]) * b.width + column);
      }
    }
  }
#pragma unroll
  for (int e = 0; e < kN; ++e) shared[warp][lane][e] = sum[e];
  __syncthreads();
  if (warp != 0 || !inside) return;
#pragma unroll
  for (int e = 0; e < kN; ++e) {
    float total = 0.0F;
    for (int i = 0; i < kWarps; ++i) total += shared[i][lane][e];
    b.partials[static_cast<std::int64_t>(blockIdx.x) * b.width + column + e] = total;
  }
}

constexpr int kBiasThreads = 1024;

/// dbias += sum of dr, by one block.
__global__ void __launch_bounds__(kBiasThreads)
    bias_kernel(float* dbias, const float* dr, std::int64_t rows) {
  __shared__ float shared[32];
  float sum = 0.0F;
  for (std::int64_t i = threadIdx.x; i < rows; i += kBiasThreads) sum += dr[i];
  sum = block_reduce(sum, Sum{}, shared);
  if (threadIdx.x == 0) *dbias += sum;
}

}  // namespace

void CudaBackend::row_score_forward(View r, ConstView x, ConstView w, ConstView bias, std::int64_t rows,
                                    std::int64_t width) {
  const char* op = "row_score_forward";
  for_compute_type(op, x.dtype, [&](auto zero) {
    using T = decltype(zero);
    float* to = output<float>(op, "r", r, rows);
    const T* from = input<T>(op, "x", x, rows * width);
    const float* weight = input<float>(op, "w", w, width);
    const float* b = optional_input<float>(op, "bias", bias, 1);
    if (rows == 0) return;
    const unsigned grid = blocks_for(rows, kWarps * kRows);
    if (packs<T>(from, width)) {
      forward_kernel<T, kPack<T>><<<grid, kThreads, 0, stream_>>>(to, from, weight, b, rows, width);
    } else {
      forward_kernel<T, 1><<<grid, kThreads, 0, stream_>>>(to, from, weight, b, rows, width);
    }
    check_launch(op);
  });
}

void CudaBackend::row_score_backward_accumulate(View dx, View dw, View dbias, ConstView dr, ConstView x,
                                                ConstView w, std::int64_t rows, std::int64_t width) {
  const char* op = "row_score_backward";
  for_compute_type(op, x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* stream_gradient = optional_output<T>(op, "dx", dx, rows * width);
    float* weight_gradient = output<float>(op, "dw", dw, width);
    float* bias_gradient = optional_output<float>(op, "dbias", dbias, 1);
    const float* d = input<float>(op, "dr", dr, rows);
    const T* from = input<T>(op, "x", x, rows * width);
    const float* weight = input<float>(op, "w", w, width);
    if (rows == 0 || width == 0) return;
    const std::int64_t needed = (rows + 32 * kWarps - 1) / (32 * kWarps);
    const std::int64_t row_blocks = needed < kMostBlocks ? needed : kMostBlocks;
    const Backward<T> b{stream_gradient, scratch_of<float>(row_blocks * width), d, from, weight, rows, width};
    const auto launch = [&](auto pack) {
      constexpr int kN = decltype(pack)::value;
      const dim3 grid(static_cast<unsigned>(row_blocks), blocks_for(width, 32 * kN));
      backward_kernel<T, kN><<<grid, kThreads, 0, stream_>>>(b);
    };
    if (packs<T>(from, width) && packs<T>(stream_gradient, width)) {
      launch(std::integral_constant<int, kPack<T>>{});
    } else {
      launch(std::integral_constant<int, 1>{});
    }
    check_launch(op);
    add_column_sums(op,
                    {.out = weight_gradient,
                     .partials = b.partials,
                     .count = row_blocks,
                     .width = width,
                     .stride = width},
                    stream_);
    if (bias_gradient != nullptr) {
      bias_kernel<<<1, kBiasThreads, 0, stream_>>>(bias_gradient, d, rows);
      check_launch(op);
    }
  });
}

}  // namespace fathom::cuda
