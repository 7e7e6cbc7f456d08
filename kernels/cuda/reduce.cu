// Sums over all elements, and the count of those that are not finite.
//
// Two stages: a fixed set of blocks, each with its own partial result, then one block that adds the partials
// in order. Everything is added in double: this GPU converts and adds doubles several times faster than
// memory delivers floats.
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;                  // packs in flight in a thread
constexpr std::int64_t kMostBlocks = 1024;  // one wave of an H100, and the same order on every GPU

struct Itself {
  using Total = double;
  __device__ double operator()(float x) const { return x; }
};
struct Square {
  using Total = double;
  __device__ double operator()(float x) const { return static_cast<double>(x) * static_cast<double>(x); }
};
struct NotFinite {
  using Total = long long;
  __device__ long long operator()(float x) const {
    return (__float_as_uint(x) & 0x7f800000U) == 0x7f800000U ? 1 : 0;
  }
};

/// The sum over the block, for thread 0; `shared` holds 32 elements.
template <typename Total>
__device__ Total block_sum(Total x, Total* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  if (warp != 0) return x;
  x = lane < static_cast<int>(blockDim.x) / 32 ? shared[lane] : Total{};
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

/// partials[block] = the sum of f over the block's packs. Reads n elements. kN: elements of a pack, 1 when
/// unaligned.
template <typename T, int kN, typename F>
__global__ void __launch_bounds__(kThreads)
    reduce_to_partials(typename F::Total* partials, const T* in, std::int64_t n, F f) {
  using Total = typename F::Total;
  __shared__ Total shared[32];
  const std::int64_t packs = n / kN;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  Total total{};
  std::int64_t i = thread;
  for (; i + (kUnroll - 1) * threads < packs; i += kUnroll * threads) {
    Pack<T, kN> values[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) values[k] = Pack<T, kN>::load(in + (i + k * threads) * kN);
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
#pragma unroll
      for (int e = 0; e < kN; ++e) total += f(values[k].v[e]);
    }
  }
  for (; i < packs; i += threads) {
    const auto values = Pack<T, kN>::load(in + i * kN);
#pragma unroll
    for (int e = 0; e < kN; ++e) total += f(values.v[e]);
  }
  if (packs * kN + thread < n) total += f(to_float(in[packs * kN + thread]));
  total = block_sum(total, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

template <typename Out, typename Total>
__global__ void __launch_bounds__(kThreads) reduce_partials(Out* out, const Total* partials, int count) {
  __shared__ Total shared[32];
  Total total{};
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) total += partials[i];
  total = block_sum(total, shared);
  if (threadIdx.x == 0) *out = static_cast<Out>(total);
}

std::int64_t partials_of(std::int64_t n, int pack) {
  const std::int64_t blocks = (n + kThreads * kUnroll * pack - 1) / (kThreads * kUnroll * pack);
  return blocks < kMostBlocks ? blocks : kMostBlocks;
}

template <typename T, typename Out, typename F>
void reduce(cudaStream_t stream, const char* op, Out* out, typename F::Total* partials, const T* in,
            std::int64_t n, F f) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(in) % 16 == 0;
  const std::int64_t blocks = partials_of(n, aligned ? kPack<T> : 1);
  const auto grid = static_cast<unsigned>(blocks);
  if (blocks > 0 && aligned) {
    reduce_to_partials<T, kPack<T>><<<grid, kThreads, 0, stream>>>(partials, in, n, f);
  } else if (blocks > 0) {
    reduce_to_partials<T, 1><<<grid, kThreads, 0, stream>>>(partials, in, n, f);
  }
  reduce_partials<<<1, kThreads, 0, stream>>>(out, partials, static_cast<int>(blocks));
  check_launch(op);
}

}  // namespace

void CudaBackend::sum(View out, ConstView in) {
  for_compute_type("sum", in.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto* to = output<float>("sum", "out", out, 1);
    const T* from = input<T>("sum", "in", in, in.size);
    reduce(stream_, "sum", to, scratch_of<double>(kMostBlocks), from, in.size, Itself{});
  });
}

void CudaBackend::sum_squares(View out, ConstView in) {
  for_compute_type("sum_squares", in.dtype, [&](auto zero) {
    using T = decltype(zero);
    auto* to = output<float>("sum_squares", "out", out, 1);
    const T* from = input<T>("sum_squares", "in", in, in.size);
    reduce(stream_, "sum_squares", to, scratch_of<double>(kMostBlocks), from, in.size, Square{});
  });
}

std::int64_t CudaBackend::count_nonfinite(ConstView in) {
  const char* op = "count_nonfinite";
  std::int64_t count = 0;
  for_compute_type(op, in.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = input<T>(op, "in", in, in.size);
    auto* partials = scratch_of<long long>(kMostBlocks + 1);
    reduce(stream_, op, partials + kMostBlocks, partials, from, in.size, NotFinite{});
    copy_to_host(&count, partials + kMostBlocks, sizeof(count));
  });
  return count;
}

}  // namespace fathom::cuda
