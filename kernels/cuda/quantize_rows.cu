// Rows as codes of few bits. The largest magnitude is that of the floats' bits without their signs, in which
// what is not finite comes last.
//
// A row lies in the registers of one warp or of several between the largest and the codes, so that it is read
// once: 3 bytes an element of bf16. A division to the last bit costs as many instructions as all the rest, so
// codes come from a product with 1 / scale, and from a division only where the product lies so near to the
// middle of two codes that the two could differ.
#include <cfloat>

#include "kernels/code_operands.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/row_packs.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kInfinity = 0x7f800000;
constexpr int kRowsOfBlock = 4;  // where a row is a warp's

template <typename T>
struct Arguments {
  std::int8_t* codes;
  float* scales;
  const T* x;
  std::int64_t rows, columns, stride, row_bytes;
  float clip_over_most, least;

  /// Of a row whose largest magnitude has these bits, and is finite.
  __device__ __forceinline__ float scale_of(int bits) const {
    const float scale = fminf(__fmul_rn(__int_as_float(bits), clip_over_most), FLT_MAX / -least);
    return scale > 0 ? scale : 1.0F;
  }
  __device__ __forceinline__ float clamped(float code) const { return fminf(fmaxf(code, least), -least - 1); }
  __device__ __forceinline__ int exact_code(float x, float scale) const {
    return __float2int_rn(clamped(__fdiv_rn(x, scale)));
  }
};

/// Every thread gets the result.
template <int kWarps>
__device__ __forceinline__ int largest_of_block(int x) {
  __shared__ int warps[kWarps];
  x = __reduce_max_sync(kFullWarp, x);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
#pragma unroll
  for (const int of : warps) x = max(x, of);
  return x;
}

/// Any row. Reads x twice, writes a byte an element.
template <typename T>
__global__ void __launch_bounds__(kThreads) quantize_rows_kernel(Arguments<T> a) {
  const std::int64_t row = blockIdx.x;
  const T* from = a.x + row * a.stride;
  std::int8_t* to = a.codes + row * a.row_bytes;
  int bits = 0;
  for (std::int64_t i = threadIdx.x; i < a.columns; i += kThreads)
    bits = max(bits, __float_as_int(to_float(from[i])) & 0x7fffffff);
  bits = largest_of_block<kThreads / 32>(bits);
  const bool finite = bits < kInfinity;
  const float scale = a.scale_of(bits);
  if (threadIdx.x == 0) a.scales[row] = finite ? scale : __int_as_float(0x7fc00000);
  for (std::int64_t i = threadIdx.x; i < a.row_bytes; i += kThreads)
    to[i] = static_cast<std::int8_t>(finite && i < a.columns ? a.exact_code(to_float(from[i]), scale) : 0);
}

/// The largest of what the bits without signs are, of a pack.
__device__ __forceinline__ int largest_bits(const Pack<float>&, const uint4& raw, int so_far) {
  constexpr unsigned kMagnitude = 0x7fffffffU;
  const unsigned a = max(raw.x & kMagnitude, raw.y & kMagnitude);
  const unsigned b = max(raw.z & kMagnitude, raw.w & kMagnitude);
  return max(so_far, static_cast<int>(max(a, b)));
}
/// Of bf16 two at once, and as bf16: the upper half of the result is a float's.
__device__ __forceinline__ int largest_bits(const Pack<__nv_bfloat16>&, const uint4& raw, int so_far) {
  constexpr unsigned kMagnitude = 0x7fff7fffU;
  const unsigned a = __vmaxu2(raw.x & kMagnitude, raw.y & kMagnitude);
  const unsigned b = __vmaxu2(raw.z & kMagnitude, raw.w & kMagnitude);
  const unsigned most = __vmaxu2(a, b);
  return max(so_far, static_cast<int>(max(most << 16, most & 0xffff0000U)));
}

/// The codes of a pack, a byte each. With s = x / scale to the last bit, and t the product with 1 / scale,
/// each of two roundings: |t - s| < 2^-22 |s|, and up to 129 that is below kUnsure, so that both have one
/// nearest integer where t is farther than that from a middle. Beyond, both are clamped.
template <int N>
__device__ __forceinline__ void codes_of(unsigned (&words)[N / 4], const float (&v)[N], float scale,
                                         float inverse, bool exactly, float least) {
  constexpr float kNoFraction = 0x1.8p23F;  // sums with it have none in fp32, and end with the integer's bits
  constexpr float kUnsure = 0x1p-14F;
  unsigned sums[N];
  float farthest = 0;  // from an integer
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float code = fminf(fmaxf(__fmul_rn(v[i], inverse), least), -least - 1);
    const float sum = __fadd_rn(code, kNoFraction);
    sums[i] = __float_as_uint(sum);
    farthest = fmaxf(farthest, fabsf(__fsub_rn(code, __fsub_rn(sum, kNoFraction))));
  }
  if (exactly || farthest > 0.5F - kUnsure) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float code = fminf(fmaxf(__fdiv_rn(v[i], scale), least), -least - 1);
      sums[i] = __float_as_uint(__fadd_rn(code, kNoFraction));
    }
  }
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const unsigned low = __byte_perm(sums[i], sums[i + 1], 0x0040);
    const unsigned high = __byte_perm(sums[i + 2], sums[i + 3], 0x0040);
    words[i / 4] = __byte_perm(low, high, 0x5410);
  }
}

__device__ __forceinline__ void store_words(std::int8_t* to, const unsigned (&words)[1]) {
  *reinterpret_cast<unsigned*>(to) = words[0];
}
__device__ __forceinline__ void store_words(std::int8_t* to, const unsigned (&words)[2]) {
  *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
}

/// Rows of whole packs, each of kWarps warps with kPacks packs a lane. Reads x once, writes a byte an
/// element.
template <typename T, int kPacks, int kWarps>
__global__ void __launch_bounds__(32 * (kWarps == 1 ? kRowsOfBlock : kWarps))
    quantize_packs_kernel(Arguments<T> a) {
  constexpr int N = kPack<T>, kLanes = 32 * kWarps;
  constexpr int kRows = kWarps == 1 ? kRowsOfBlock : 1;
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * kRows + threadIdx.x / kLanes;
  if (row >= a.rows) return;  // whole warps, and of kRows > 1 alone
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int packs = static_cast<int>(a.columns / N);
  const T* from = a.x + row * a.stride;
  uint4 raw[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = lane + k * kLanes;
    raw[k] = i < packs ? load_raw(from + i * N) : make_uint4(0, 0, 0, 0);
  }
  int bits = 0;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) bits = largest_bits(Pack<T>{}, raw[k], bits);
  if constexpr (kWarps == 1) {
    bits = __reduce_max_sync(kFullWarp, bits);
  } else {
    bits = largest_of_block<kWarps>(bits);
  }
  const bool finite = bits < kInfinity;
  const float scale = a.scale_of(bits);
  if (lane == 0) a.scales[row] = finite ? scale : __int_as_float(0x7fc00000);
  // Of others 1 / scale is no normal number.
  const bool exactly = !(scale > 0x1p-100F && scale < 0x1p100F);
  const float inverse = exactly ? 0.0F : __fdiv_rn(1.0F, scale);
  std::int8_t* to = a.codes + row * a.row_bytes;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = lane + k * kLanes;
    if (i * N >= a.row_bytes) continue;  // zeros behind the columns are the codes of packs that are zero
    unsigned words[N / 4] = {};
    if (finite) codes_of<N>(words, unpack<T>(raw[k]).v, scale, inverse, exactly, a.least);
    store_words(to + i * N, words);
  }
}

template <typename T, int kPacks, int kWarps>
bool launch_packs(const char* op, const Arguments<T>& a, cudaStream_t stream) {
  // The zeros behind a row's columns count.
  if (a.row_bytes > std::int64_t{kPacks} * kWarps * 32 * kPack<T>) return false;
  const int rows = kWarps == 1 ? kRowsOfBlock : 1;
  launch(op, quantize_packs_kernel<T, kPacks, kWarps>,
         {blocks_for(a.rows, rows), static_cast<unsigned>(32 * kWarps * rows)}, stream, a);
  return true;
}

/// The fewest registers that hold a row; of few rows more warps, since each then works once, and all wait for
/// memory together.
template <typename T>
bool launch_some_packs(const char* op, const Arguments<T>& a, int multiprocessors, cudaStream_t stream) {
  constexpr std::int64_t kFew = 16;  // of a multiprocessor
  if (a.rows < kFew * multiprocessors && a.row_bytes > 64 * kPack<T> &&
      (launch_packs<T, 1, 4>(op, a, stream) || launch_packs<T, 2, 4>(op, a, stream) ||
       launch_packs<T, 2, 8>(op, a, stream) || launch_packs<T, 3, 8>(op, a, stream) ||
       launch_packs<T, 4, 8>(op, a, stream)))
    return true;
  return launch_packs<T, 1, 1>(op, a, stream) || launch_packs<T, 2, 1>(op, a, stream) ||
         launch_packs<T, 4, 1>(op, a, stream) || launch_packs<T, 8, 1>(op, a, stream) ||
         launch_packs<T, 4, 4>(op, a, stream) || launch_packs<T, 6, 4>(op, a, stream) ||
         launch_packs<T, 8, 4>(op, a, stream) || launch_packs<T, 6, 8>(op, a, stream) ||
         launch_packs<T, 8, 8>(op, a, stream) || launch_packs<T, 8, 16>(op, a, stream);
}

}  // namespace

void CudaBackend::quantize_rows(View codes, View scales, ConstView x, const RowQuantization& s) {
  const char* op = "quantize_rows";
  check_row_quantization(op, s);
  const std::int64_t row_bytes = s.format().row_bytes();
  auto* to = reinterpret_cast<std::int8_t*>(output<std::uint8_t>(op, "codes", codes, s.rows * row_bytes));
  auto* to_scales = output<float>(op, "scales", scales, s.rows);
  const float least = -static_cast<float>(1 << (s.bits - 1));
  for_compute_type(op, x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* in = input<T>(op, "x", x, s.x_size());
    if (s.rows == 0) return;
    const Arguments<T> a{to,   to_scales, in, s.rows, s.columns, s.x_row(), row_bytes, s.clip / (-least - 1),
                         least};
    // Rows of codes begin every 64 bytes.
    const bool whole = packs<T>(in, s.columns) && s.x_row() % kPack<T> == 0 && aligned(to);
    if (whole && launch_some_packs<T>(op, a, multiprocessors(), stream())) return;
    launch(op, quantize_rows_kernel<T>, {static_cast<unsigned>(s.rows), kThreads}, stream(), a);
  });
}

}  // namespace fathom::cuda
