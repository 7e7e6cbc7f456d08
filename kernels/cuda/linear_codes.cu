// y = x W^T of codes with codes: sums of products in 32 bits of integer, and then the scales. Weights with
// one scale a row take tensor cores: CUTLASS where x has many rows (codes_gemm.h), for which weights of 4
// bits become bytes in scratch memory, and else linear_codes_few_rows.cu. Groups are added up here, four
// products at a time (dp4a): tiles of 64 x 64 where a group is whole runs of 64 columns; else a thread an
// element.
#include "kernels/code_operands.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/codes_gemm.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/vector.cuh"
#include "kernels/cuda/linear_codes.h"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kTile = 64;          // rows and outs of a thread block; and columns at a time
constexpr int kWords = kTile / 4;  // of four codes
constexpr int kOwn = 4;            // rows and outs of a thread

/// From how many rows on CUTLASS is ahead of linear_codes_few_rows.cu. On an H200, 4096 x 4096 of 8 bits: 64
/// rows take it 14 us, where CUTLASS takes 10 for twice as many; of 4 bits, which CUTLASS wants unpacked
/// first, 13 and 16 (`fathom bench gemm --codes`).
constexpr std::int64_t many_rows(int bits) { return bits == 8 ? 33 : 65; }

/// Four codes of 4 bits, from 16 bits, one a byte.
__device__ __forceinline__ int spread(unsigned nibbles) {
  const unsigned apart =
      (nibbles & 0x000fU) | (nibbles & 0x00f0U) << 4 | (nibbles & 0x0f00U) << 8 | (nibbles & 0xf000U) << 12;
  return static_cast<int>(__vsub4(apart ^ 0x08080808U, 0x08080808U));
}

/// Reads x once a column of tiles, and W once a row of them. blockIdx.z: the product of a batch.
template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads) codes_kernel(CodesOperands<T> a) {
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
__global__ void __launch_bounds__(kThreads) any_group_kernel(CodesOperands<T> a, std::int64_t elements) {
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
void run_groups(const CodesOperands<T>& a, cudaStream_t stream) {
  if (a.group == a.columns || a.group % kTile == 0) {
    const dim3 blocks(blocks_for(a.out, kTile), blocks_for(a.rows, kTile), static_cast<unsigned>(a.batch));
    codes_kernel<T, kBits><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    const std::int64_t elements = a.batch * a.rows * a.out;
    any_group_kernel<T, kBits><<<blocks_for(elements, kThreads), kThreads, 0, stream>>>(a, elements);
  }
  check_launch("linear_codes_forward");
}

constexpr int kByteThreads = 256;
constexpr int kByteUnroll = 4;
constexpr int kTimes = 16;  // what bytes are of the codes of 4 bits

/// Weights of 4 bits that become bytes: 16 times their codes, each the upper half of a byte, which has its
/// sign. Scales of a sixteenth go with them: sums are 16 times as large, and their products with the scales
/// what they were, both exactly.
struct ToBytes {
  std::uint8_t* to;          // [rows, to_bytes]: PackedFormat's rows of 8 bits
  float* to_scales;          // [scales]
  const std::uint8_t* from;  // [rows, from_bytes], at least half as many
  const float* from_scales;
  std::int64_t rows, to_bytes, from_bytes, scales;
};

/// Eight codes, from the lowest bits on, as so many bytes.
__device__ __forceinline__ uint2 bytes_of(unsigned codes) {
  const unsigned even = codes << 4 & 0xf0f0f0f0U, odd = codes & 0xf0f0f0f0U;
  return make_uint2(__byte_perm(even, odd, 0x5140), __byte_perm(even, odd, 0x7362));
}

/// A thread kByteUnroll times 16 bytes.
__global__ void __launch_bounds__(kByteThreads) bytes_kernel(ToBytes a) {
  const std::int64_t i = std::int64_t{blockIdx.x} * (kByteThreads * kByteUnroll) + threadIdx.x;
  const std::int64_t of_row = a.to_bytes / 16, all = a.rows * of_row;
  uint2 codes[kByteUnroll];
#pragma unroll
  for (int k = 0; k < kByteUnroll; ++k) {
    const std::int64_t n = i + k * kByteThreads;
    if (n >= all) continue;
    const std::int64_t row = a.rows == 1 ? 0 : n / of_row;
    codes[k] = *reinterpret_cast<const uint2*>(a.from + row * a.from_bytes + (n - row * of_row) * 8);
  }
#pragma unroll
  for (int k = 0; k < kByteUnroll; ++k) {
    const std::int64_t n = i + k * kByteThreads;
    if (n < a.scales) a.to_scales[n] = a.from_scales[n] * (1.0F / kTimes);
    if (n >= all) continue;
    const uint2 low = bytes_of(codes[k].x), high = bytes_of(codes[k].y);
    reinterpret_cast<uint4*>(a.to)[n] = {low.x, low.y, high.x, high.y};
  }
}

/// Bytes of scratch memory that a matrix takes: bytes, and scales behind them.
std::int64_t scratch_bytes(std::int64_t out, std::int64_t x_bytes) {
  return out * (x_bytes + static_cast<std::int64_t>(sizeof(float)));
}

/// g's w and w_scales become those of 8 bits in `scratch`, of matrix e.
void to_bytes(CodesGemm& g, const CodesOperands<bf16>& a, std::int64_t e, std::uint8_t* scratch,
              cudaStream_t stream) {
  ToBytes b{scratch,
            reinterpret_cast<float*>(scratch + a.out * a.x_bytes),  // x_bytes: whole 64
            a.w + e * a.out * a.w_bytes,
            a.w_scales + e * a.out,
            a.out,
            a.x_bytes,
            a.w_bytes,
            a.out};
  g.w = b.to;
  g.w_scales = b.to_scales;
  if (a.x_bytes == 2 * a.w_bytes) b.rows = 1, b.to_bytes *= a.out, b.from_bytes *= a.out;  // no gaps
  bytes_kernel<<<blocks_for(b.rows * b.to_bytes / 16, kByteThreads * kByteUnroll), kByteThreads, 0, stream>>>(
      b);
  check_launch("linear_codes_forward");
}

/// False: it is not for CUTLASS. `scratch` gives so many bytes of device memory. base: null, or what y is
/// added to.
template <typename Scratch>
bool run_many_rows(const CodesOperands<bf16>& a, const bf16* base, int multiprocessors, cudaStream_t stream,
                   Scratch&& scratch) {
  CodesGemm g{a.y, base, a.x, a.x_scales, a.w, a.w_scales, a.batch, a.rows, a.out, a.x_bytes};
  if (a.rows < many_rows(a.bits) || !takes_codes_gemm(g)) return false;
  if (a.bits == 8) {
    codes_gemm(g, multiprocessors, stream);
    return true;
  }
  std::uint8_t* const bytes = scratch(scratch_bytes(a.out, a.x_bytes));
  g.batch = 1;
  for (std::int64_t e = 0; e < a.batch; ++e) {  // a matrix at a time, as scratch memory is no larger
    to_bytes(g, a, e, bytes, stream);
    g.y = a.y + e * a.rows * a.out;
    if (base != nullptr) g.base = base + e * a.rows * a.out;
    g.x = a.x + e * a.rows * a.x_bytes;
    g.x_scales = a.x_scales + e * a.rows;
    codes_gemm(g, multiprocessors, stream);
  }
  return true;
}
template <typename Scratch>
bool run_many_rows(const CodesOperands<float>&, const float*, int, cudaStream_t, Scratch&&) {
  return false;
}

template <typename T>
CodesOperands<T> operands_of(const char* op, View y, const PackedView& x, const PackedView& w,
                             const LinearShape& s) {
  const PackedFormat& f = w.format;
  check_codes_product(op, x.format, f, s);
  const std::int64_t row_bytes = x.format.row_bytes();
  return {output<T>(op, "y", y, s.batch * s.rows * s.out),
          input<std::uint8_t>(op, "x", x.codes, s.batch * s.rows * row_bytes),
          input<float>(op, "scales of x", x.scales, s.batch * s.rows),
          input<std::uint8_t>(op, "codes", w.codes, s.batch * s.out * f.row_bytes()),
          input<float>(op, "scales", w.scales, s.batch * s.out * f.groups()),
          s.batch,
          s.rows,
          s.out,
          s.in,
          f.group,
          row_bytes,
          f.row_bytes(),
          f.bits};
}

/// Of one group, and whole packs.
template <typename T>
bool has_tensor_cores(const CodesOperands<T>& a) {
  return a.group == a.columns && aligned(a.x) && aligned(a.w);
}

}  // namespace

void CudaBackend::linear_codes_forward(View y, const PackedView& x, const PackedView& w,
                                       const LinearShape& s) {
  const char* op = "linear_codes_forward";
  for_compute_type(op, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto a = operands_of<T>(op, y, x, w, s);
    if (s.rows * s.out == 0) return;
    if (has_tensor_cores(a)) {
      const auto bytes = [&](std::int64_t n) { return scratch_of<std::uint8_t>(n); };
      if (!run_many_rows(a, static_cast<const T*>(nullptr), multiprocessors_, stream(), bytes))
        codes_of_few_rows(a, multiprocessors_, stream());
    } else if (a.bits == 4) {
      run_groups<T, 4>(a, stream());
    } else {
      run_groups<T, 8>(a, stream());
    }
    for (std::int64_t e = 0; e < s.batch; ++e) flop_log.gemm(s.rows, s.out, s.in);
  });
}

void CudaBackend::linear_codes_add_forward(View y, ConstView base, const PackedView& x, const PackedView& w,
                                           const LinearShape& s) {
  const char* op = "linear_codes_forward";
  bool done = false;
  for_compute_type(op, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto a = operands_of<T>(op, y, x, w, s);
    const T* onto = input<T>(op, "base", base, y.size);
    if (y.size > 0 && base.data == y.data) throw InternalError("[linear] base is y: it would be overwritten");
    if (s.rows * s.out == 0 || !has_tensor_cores(a)) return;
    const auto bytes = [&](std::int64_t n) { return scratch_of<std::uint8_t>(n); };
    done = run_many_rows(a, onto, multiprocessors_, stream(), bytes);
    if (!done) return;
    for (std::int64_t e = 0; e < s.batch; ++e) flop_log.gemm(s.rows, s.out, s.in);
  });
  if (!done) Backend::linear_codes_add_forward(y, base, x, w, s);
}

}  // namespace fathom::cuda
