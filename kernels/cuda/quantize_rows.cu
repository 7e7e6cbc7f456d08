// Rows as codes of few bits, a thread block a row. The largest magnitude is that of the floats' bits without
// their signs, in which what is not finite comes last.
#include <cfloat>

#include "kernels/code_operands.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;

/// Every thread gets the result.
__device__ __forceinline__ int largest_of_block(int x) {
  __shared__ int warps[kThreads / 32];
  x = __reduce_max_sync(kFullWarp, x);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  for (const int of : warps) x = max(x, of);
  return x;
}

/// Reads x twice, writes a byte an element.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_rows_kernel(std::int8_t* codes, float* scales, const T* x, std::int64_t columns,
                         std::int64_t stride, std::int64_t row_bytes, float clip_over_most, float least) {
  constexpr int kInfinity = 0x7f800000;
  const std::int64_t row = blockIdx.x;
  const T* from = x + row * stride;
  std::int8_t* to = codes + row * row_bytes;
  int bits = 0;
  for (std::int64_t i = threadIdx.x; i < columns; i += kThreads)
    bits = max(bits, __float_as_int(to_float(from[i])) & 0x7fffffff);
  bits = largest_of_block(bits);
  const bool finite = bits < kInfinity;
  float scale = fminf(__fmul_rn(__int_as_float(bits), clip_over_most), FLT_MAX / -least);
  if (!(scale > 0)) scale = 1;
  if (threadIdx.x == 0) scales[row] = finite ? scale : __int_as_float(0x7fc00000);
  for (std::int64_t i = threadIdx.x; i < row_bytes; i += kThreads) {
    float code = 0;
    if (finite && i < columns) code = fminf(fmaxf(__fdiv_rn(to_float(from[i]), scale), least), -least - 1);
    to[i] = static_cast<std::int8_t>(__float2int_rn(code));
  }
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
    quantize_rows_kernel<T><<<static_cast<unsigned>(s.rows), kThreads, 0, stream()>>>(
        to, to_scales, in, s.columns, s.x_row(), row_bytes, s.clip / (-least - 1), least);
    check_launch(op);
  });
}

}  // namespace fathom::cuda
