// Rows as codes of few bits. A row lies in the registers of one warp or of several between its largest
// magnitude and the codes (device/row_codes.cuh), so that it is read once: 3 bytes an element of bf16.
#include "kernels/code_operands.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/row_codes.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kRowsOfBlock = 4;  // where a row is a warp's

template <typename T>
struct Arguments {
  std::int8_t* codes;
  float* scales;
  const T* x;
  std::int64_t rows, columns, stride, row_bytes;
  CodeRule rule;
};

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
  const RowScale scale(a.rule, bits);
  if (threadIdx.x == 0) a.scales[row] = scale.stored();
  for (std::int64_t i = threadIdx.x; i < a.row_bytes; i += kThreads)
    to[i] = static_cast<std::int8_t>(scale.finite && i < a.columns ? scale.exact_code(to_float(from[i])) : 0);
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
  const RowScale scale(a.rule, bits);
  if (lane == 0) a.scales[row] = scale.stored();
  std::int8_t* to = a.codes + row * a.row_bytes;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = lane + k * kLanes;
    if (i * N >= a.row_bytes) continue;  // zeros behind the columns are the codes of packs that are zero
    unsigned words[N / 4];
    scale.codes_of<N>(words, unpack<T>(raw[k]).v);
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
  for_compute_type(op, x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* in = input<T>(op, "x", x, s.x_size());
    if (s.rows == 0) return;
    const Arguments<T> a{to, to_scales, in, s.rows, s.columns, s.x_row(), row_bytes, CodeRule(s)};
    // Rows of codes begin every 64 bytes.
    const bool whole = packs<T>(in, s.columns) && s.x_row() % kPack<T> == 0 && aligned(to);
    if (whole && launch_some_packs<T>(op, a, multiprocessors(), stream())) return;
    launch(op, quantize_rows_kernel<T>, {static_cast<unsigned>(s.rows), kThreads}, stream(), a);
  });
}

}  // namespace fathom::cuda
