// y = x W^T of codes with codes: sums of products in 32 bits of integer, four at a time (dp4a), and then the
// scales. Tiles of 64 x 64 where a group is whole runs of 64 columns; else a thread an element.
#include "kernels/code_operands.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;          // rows and outs of a thread block; and columns at a time
constexpr int kWords = kTile / 4;  // of four codes
constexpr int kOwn = 4;            // rows and outs of a thread

template <typename T>
struct Operands {
  T* y;
  const std::uint8_t* x;
  const float* x_scales;
  const std::uint8_t* w;
  const float* w_scales;
  std::int64_t rows, out, columns, group, x_bytes, w_bytes;
};

/// Four codes of 4 bits, from 16 bits, one a byte.
__device__ __forceinline__ int spread(unsigned nibbles) {
  const unsigned apart =
      (nibbles & 0x000fU) | (nibbles & 0x00f0U) << 4 | (nibbles & 0x0f00U) << 8 | (nibbles & 0xf000U) << 12;
  return static_cast<int>(__vsub4(apart ^ 0x08080808U, 0x08080808U));
}

/// Reads x once a column of tiles, and W once a row of them. blockIdx.z: the product of a batch.
template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads) codes_kernel(Operands<T> a) {
  __shared__ int xs[kTile][kWords + 1], ws[kTile][kWords + 1];
  const std::int64_t e = blockIdx.z, row0 = std::int64_t{blockIdx.y} * kTile,
                     out0 = std::int64_t{blockIdx.x} * kTile;
  const std::uint8_t* x = a.x + e * a.rows * a.x_bytes;
  const std::uint8_t* w = a.w + e * a.out * a.w_bytes;
  const std::int64_t groups = a.columns / a.group;
  const float* w_scales = a.w_scales + e * a.out * groups;
  const int tx = static_cast<int>(threadIdx.x) % 16, ty = static_cast<int>(threadIdx.x) / 16;
  int dot[kOwn][kOwn] = {};
  float sum[kOwn][kOwn] = {};
  for (std::int64_t k = 0; k < a.columns; k += kTile) {
    for (int i = static_cast<int>(threadIdx.x); i < kTile * kWords; i += kThreads) {
      const int r = i / kWords, word = i % kWords;
      const bool in_x = row0 + r < a.rows, in_w = out0 + r < a.out;
      xs[r][word] = in_x ? *reinterpret_cast<const int*>(x + (row0 + r) * a.x_bytes + k + word * 4) : 0;
      const std::uint8_t* from = w + (out0 + r) * a.w_bytes + (k + word * 4) * kBits / 8;
      if constexpr (kBits == 8) {
        ws[r][word] = in_w ? *reinterpret_cast<const int*>(from) : 0;
      } else {
        ws[r][word] = in_w ? spread(*reinterpret_cast<const std::uint16_t*>(from)) : 0;
      }
    }
    __syncthreads();
#pragma unroll
    for (int word = 0; word < kWords; ++word) {
      int from[kOwn], codes[kOwn];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) from[i] = xs[ty + 16 * i][word], codes[i] = ws[tx + 16 * i][word];
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
#pragma unroll
        for (int j = 0; j < kOwn; ++j) dot[i][j] = __dp4a(from[i], codes[j], dot[i][j]);
      }
    }
    __syncthreads();
    const std::int64_t next = k + kTile < a.columns ? k + kTile : a.columns;
    if (next % a.group != 0) continue;
    const std::int64_t g = next / a.group - 1;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const std::int64_t o = out0 + tx + 16 * j;
      const float scale = o < a.out ? w_scales[o * groups + g] : 0.0F;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        sum[i][j] += static_cast<float>(dot[i][j]) * scale;
        dot[i][j] = 0;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const std::int64_t r = row0 + ty + 16 * i;
    if (r >= a.rows) break;
    const float scale = a.x_scales[e * a.rows + r];
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const std::int64_t o = out0 + tx + 16 * j;
      if (o < a.out) a.y[(e * a.rows + r) * a.out + o] = from_float<T>(sum[i][j] * scale);
    }
  }
}

/// Any group: a thread an element of y, through the whole batch.
template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads) any_group_kernel(Operands<T> a, std::int64_t elements) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= elements) return;
  const std::int64_t row = i / a.out, o = row / a.rows * a.out + i % a.out;  // through the batch
  const auto* x = reinterpret_cast<const std::int8_t*>(a.x + row * a.x_bytes);
  const std::uint8_t* w = a.w + o * a.w_bytes;
  const float* scales = a.w_scales + o * (a.columns / a.group);
  float sum = 0;
  int dot = 0;
  for (std::int64_t c = 0; c < a.columns; ++c) {
    int code = 0;
    if constexpr (kBits == 8) {
      code = static_cast<std::int8_t>(w[c]);
    } else {
      code = ((w[c / 2] >> (c % 2 * 4) & 15) ^ 8) - 8;
    }
    dot += x[c] * code;
    if ((c + 1) % a.group != 0) continue;
    sum += static_cast<float>(dot) * scales[c / a.group];
    dot = 0;
  }
  a.y[i] = from_float<T>(sum * a.x_scales[row]);
}

template <typename T, int kBits>
void run(const Operands<T>& a, std::int64_t batch, cudaStream_t stream) {
  if (a.group == a.columns || a.group % kTile == 0) {
    const dim3 blocks(blocks_for(a.out, kTile), blocks_for(a.rows, kTile), static_cast<unsigned>(batch));
    codes_kernel<T, kBits><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    const std::int64_t elements = batch * a.rows * a.out;
    any_group_kernel<T, kBits><<<blocks_for(elements, kThreads), kThreads, 0, stream>>>(a, elements);
  }
  check_launch("linear_codes_forward");
}

}  // namespace

void CudaBackend::linear_codes_forward(View y, const PackedView& x, const PackedView& w,
                                       const LinearShape& s) {
  const char* op = "linear_codes_forward";
  const PackedFormat& f = w.format;
  check_codes_product(op, x.format, f, s);
  const std::int64_t row_bytes = x.format.row_bytes();
  const auto* rows = input<std::uint8_t>(op, "x", x.codes, s.batch * s.rows * row_bytes);
  const auto* row_scales = input<float>(op, "scales of x", x.scales, s.batch * s.rows);
  const auto* codes = input<std::uint8_t>(op, "codes", w.codes, s.batch * s.out * f.row_bytes());
  const auto* scales = input<float>(op, "scales", w.scales, s.batch * s.out * f.groups());
  for_compute_type(op, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = output<T>(op, "y", y, s.batch * s.rows * s.out);
    if (s.rows * s.out == 0) return;
    const Operands<T> a{out,   rows, row_scales, codes,     scales,       s.rows,
                        s.out, s.in, f.group,    row_bytes, f.row_bytes()};
    if (f.bits == 4) {
      run<T, 4>(a, s.batch, stream());
    } else {
      run<T, 8>(a, s.batch, stream());
    }
    for (std::int64_t e = 0; e < s.batch; ++e) flop_log.gemm(s.rows, s.out, s.in);
  });
}

}  // namespace fathom::cuda
