// out[i] = x[indices[i]], by rows and for single integers, and the backward of the first.
#include <cuda_runtime.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/gather_rows.cuh"
#include "kernels/cuda/device/raw_pack.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kInFlight = 4;  // packs of each operand that a lane loads before it uses the first

template <typename T>
struct RowAdd {
  T* dx;          // [source_rows, width]
  const T* dout;  // [rows, width]
  const std::int32_t* indices;
  std::int64_t rows, width;
};

/// dx[indices[i]] += dout[i], a warp a row: the indices are unique, so no two warps meet. They are trusted to
/// be rows of dx: they are the forward's, which gives zeros for others and so hides what would be written
/// outside here.
/// Traffic: a read of dout, a read and a write of the rows of dx that are kept.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) add_rows_kernel(RowAdd<T> a) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= a.rows) return;
  const T* from = a.dout + row * a.width;
  const std::int64_t index = a.indices[row];
  T* to = a.dx + index * a.width;
  for (std::int64_t begin = lane * N; begin < a.width; begin += 32 * N * kInFlight) {
    RawPack<T, N> sum[kInFlight], part[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {  // these do not wait for the index
      const std::int64_t column = begin + 32 * N * u;
      if (column < a.width) part[u] = RawPack<T, N>::load(from + column);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t column = begin + 32 * N * u;
      if (column < a.width) sum[u] = RawPack<T, N>::load(to + column);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      const std::int64_t column = begin + 32 * N * u;
      if (column >= a.width) continue;
      Pack<T, N> total = sum[u].values();
      const Pack<T, N> addend = part[u].values();
#pragma unroll
      for (int i = 0; i < N; ++i) total.v[i] += addend.v[i];
      RawPack<T, N>::of(total).store(to + column);
    }
  }
}

template <typename T>
void add_rows(const char* op, const RowAdd<T>& a, cudaStream_t stream) {
  if (a.rows == 0 || a.width == 0) return;
  const unsigned blocks = blocks_for(a.rows, kWarps);
  if (packs<T>(a.dx, a.width) && packs<T>(a.dout, a.width)) {
    add_rows_kernel<T, kPack<T>><<<blocks, kThreads, 0, stream>>>(a);
  } else {
    add_rows_kernel<T, 1><<<blocks, kThreads, 0, stream>>>(a);
  }
  check_launch(op);
}

/// An index out of range, which the CPU backend throws on, gives 0. Traffic: 12 bytes an index.
__global__ void __launch_bounds__(kThreads)
    gather_int32_kernel(std::int32_t* out, const std::int32_t* in, std::int64_t in_size,
                        const std::int32_t* indices, std::int64_t n) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  const std::int64_t index = indices[i];
  out[i] = index >= 0 && index < in_size ? in[index] : 0;
}

}  // namespace

void CudaBackend::gather_rows_forward(View out, ConstView x, ConstView indices, const GatherShape& s) {
  const char* op = "gather_rows_forward";
  const auto* kept = input<std::int32_t>(op, "indices", indices, s.rows);
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    gather_rows<T>(op,
                   {output<T>(op, "out", out, s.rows * s.width),
                    input<T>(op, "x", x, s.source_rows * s.width), kept, s.rows, s.source_rows, s.width},
                   stream());
  });
}

void CudaBackend::gather_rows_backward_accumulate(View dx, ConstView dout, ConstView indices,
                                                  const GatherShape& s) {
  const char* op = "gather_rows_backward";
  const auto* kept = input<std::int32_t>(op, "indices", indices, s.rows);
  for_compute_type(op, dx.dtype, [&](auto zero) {
    using T = decltype(zero);
    add_rows<T>(op,
                {output<T>(op, "dx", dx, s.source_rows * s.width),
                 input<T>(op, "dout", dout, s.rows * s.width), kept, s.rows, s.width},
                stream());
  });
}

void CudaBackend::gather_int32(View out, ConstView in, ConstView indices) {
  const char* op = "gather_int32";
  const auto* kept = input<std::int32_t>(op, "indices", indices, out.size);
  auto* to = output<std::int32_t>(op, "out", out, out.size);
  const auto* from = input<std::int32_t>(op, "in", in, in.size);
  if (out.size == 0) return;
  gather_int32_kernel<<<blocks_for(out.size, kThreads), kThreads, 0, stream()>>>(to, from, in.size, kept,
                                                                                 out.size);
  check_launch(op);
}

}  // namespace fathom::cuda
