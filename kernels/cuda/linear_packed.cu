// y = x W^T with W of few bits: W becomes numbers in scratch memory, and the product is linear_forward's.
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;

struct Packed {
  const std::uint8_t* codes;
  const float* scales;
  std::int64_t rows, columns, group, row_bytes, code_bytes;
};

/// A thread a byte of codes. Traffic: the codes, and what they become.
template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads) unpack_kernel(T* out, Packed w) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= w.rows * w.code_bytes) return;
  constexpr int kCodes = 8 / kBits, kHalf = 1 << (kBits - 1);
  const std::int64_t row = i / w.code_bytes, byte = i % w.code_bytes;
  const int codes = w.codes[row * w.row_bytes + byte];
#pragma unroll
  for (int n = 0; n < kCodes; ++n) {
    const std::int64_t column = byte * kCodes + n;
    if (column >= w.columns) break;
    const int code = ((codes >> (n * kBits) & (2 * kHalf - 1)) ^ kHalf) - kHalf;
    const float scale = w.scales[row * (w.columns / w.group) + column / w.group];
    out[row * w.columns + column] = from_float<T>(scale * static_cast<float>(code));
  }
}

template <typename T>
void unpack(T* out, const Packed& w, int bits, cudaStream_t stream) {
  const unsigned blocks = blocks_for(w.rows * w.code_bytes, kThreads);
  if (bits == 4) {
    unpack_kernel<T, 4><<<blocks, kThreads, 0, stream>>>(out, w);
  } else {
    unpack_kernel<T, 8><<<blocks, kThreads, 0, stream>>>(out, w);
  }
  check_launch("linear_packed_forward");
}

}  // namespace

void CudaBackend::linear_packed_forward(View y, ConstView x, const PackedView& w, const LinearShape& s) {
  const char* op = "linear_packed_forward";
  const PackedFormat& f = w.format;
  if (s.batch < 1) fail(op, "batch", s.batch, 1);
  check_packed_operand(op, f, s.in);
  const auto* codes = input<std::uint8_t>(op, "codes", w.codes, s.batch * s.out * f.row_bytes());
  const auto* scales = input<float>(op, "scales", w.scales, s.batch * s.out * f.groups());
  for_compute_type(op, x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = output<T>(op, "y", y, s.batch * s.rows * s.out);
    const T* in = input<T>(op, "x", x, s.x_size());
    if (s.rows * s.out == 0) return;
    T* const numbers = scratch_of<T>(s.out * s.in);
    LinearShape one = s;
    one.batch = 1;
    for (std::int64_t e = 0; e < s.batch; ++e) {
      unpack<T>(numbers,
                {codes + e * s.out * f.row_bytes(), scales + e * s.out * f.groups(), s.out, f.columns,
                 f.group, f.row_bytes(), f.code_bytes()},
                f.bits, stream());
      linear_forward({out + e * s.rows * s.out, s.rows * s.out, y.dtype},
                     {in + e * s.rows * s.x_row(), one.x_size(), x.dtype}, {numbers, s.out * s.in, x.dtype},
                     one);
    }
  });
}

}  // namespace fathom::cuda
