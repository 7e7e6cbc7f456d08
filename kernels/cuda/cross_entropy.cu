// Softmax, cross-entropy and its gradient in one pass over the logits: a block holds a row in registers.
#include <algorithm>
#include <cmath>

#include <cuda_pipeline_primitives.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 1024;

// Two blocks are 2048 threads, and these multiprocessors have 1536.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocksOfMultiprocessor = 1;
#else
constexpr int kBlocksOfMultiprocessor = 2;
#endif

template <typename T>
struct Rows {
  float* losses;
  T* gradient;  // null: the losses alone; may be the logits
  const T* logits;
  const std::int32_t* targets;
  std::int64_t vocab;
  float scale;
};

// bf16 logits carry fewer digits than the fast exponential.
__device__ __forceinline__ float exponential(float x, float) { return expf(x); }
__device__ __forceinline__ float exponential(float x, bf16) { return __expf(x); }

template <typename T>
__device__ __forceinline__ void zero_row(T* to, std::int64_t vocab) {
  for (std::int64_t j = threadIdx.x; j < vocab; j += kThreads) to[j] = from_float<T>(0.0F);
}

/// For rows of up to kPacks * kThreads packs, whole packs. A block walks over rows; while it computes one,
/// the next is on its way to shared memory, where each thread finds the packs that it asked for itself. Reads
/// the logits once, writes the gradient once.
template <typename T, int kPacks>
__global__ void __launch_bounds__(kThreads, kPacks <= 2 ? kBlocksOfMultiprocessor : 1)
    cross_entropy_rows(Rows<T> r, std::int64_t rows) {
  constexpr int kN = kPack<T>;
  struct alignas(16) Raw {
    T e[kN];
  };
  extern __shared__ __align__(16) unsigned char memory[];
  Raw* stage = reinterpret_cast<Raw*>(memory);
  __shared__ float shared[32];
  const auto ask_for = [&](std::int64_t row) {
    if (row >= rows) return;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int slot = k * kThreads + static_cast<int>(threadIdx.x);
      if (slot * kN < r.vocab)
        __pipeline_memcpy_async(stage + slot, r.logits + row * r.vocab + slot * kN, sizeof(Raw));
    }
    __pipeline_commit();
  };
  ask_for(blockIdx.x);
  for (std::int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const std::int32_t target = r.targets[row];
    T* to = r.gradient == nullptr ? nullptr : r.gradient + row * r.vocab;
    __pipeline_wait_prior(0);
    if (target < 0 || target >= r.vocab) {  // outside of the vocabulary: it cannot be reported from here
      ask_for(row + gridDim.x);
      if (threadIdx.x == 0) r.losses[row] = target < 0 ? 0.0F : NAN;
      if (to != nullptr) zero_row(to, r.vocab);
      continue;
    }
    const float hit = to_float(r.logits[row * r.vocab + target]);
    Raw held[kPacks];
    float most = -INFINITY;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int slot = k * kThreads + static_cast<int>(threadIdx.x);
      if (slot * kN >= r.vocab) continue;
      held[k] = stage[slot];
#pragma unroll
      for (int e = 0; e < kN; ++e) most = fmaxf(most, to_float(held[k].e[e]));
    }
    ask_for(row + gridDim.x);
    most = block_reduce(most, Max{}, shared);
    float total = 0.0F;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if ((k * kThreads + static_cast<int>(threadIdx.x)) * kN >= r.vocab) continue;
#pragma unroll
      for (int e = 0; e < kN; ++e) total += exponential(to_float(held[k].e[e]) - most, T{});
    }
    total = block_reduce(total, Sum{}, shared);
    if (threadIdx.x == 0) r.losses[row] = logf(total) + (most - hit);
    if (to == nullptr) continue;
    const float share = r.scale / total;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int at = (k * kThreads + static_cast<int>(threadIdx.x)) * kN;
      if (at >= r.vocab) continue;
      Pack<T> g;
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        g.v[e] =
            exponential(to_float(held[k].e[e]) - most, T{}) * share - (at + e == target ? r.scale : 0.0F);
      }
      g.store(to + at);
    }
  }
}

/// For rows of any length. Reads the logits three times, writes the gradient once.
template <typename T>
__global__ void __launch_bounds__(kThreads) cross_entropy_any(Rows<T> r) {
  __shared__ float shared[32];
  const std::int64_t row = blockIdx.x;
  const std::int32_t target = r.targets[row];
  T* to = r.gradient == nullptr ? nullptr : r.gradient + row * r.vocab;
  if (target < 0 || target >= r.vocab) {
    if (threadIdx.x == 0) r.losses[row] = target < 0 ? 0.0F : NAN;
    if (to != nullptr) zero_row(to, r.vocab);
    return;
  }
  const T* from = r.logits + row * r.vocab;
  const float hit = to_float(from[target]);
  float most = -INFINITY, total = 0.0F;
  for (std::int64_t j = threadIdx.x; j < r.vocab; j += kThreads) most = fmaxf(most, to_float(from[j]));
  most = block_reduce(most, Max{}, shared);
  for (std::int64_t j = threadIdx.x; j < r.vocab; j += kThreads)
    total += exponential(to_float(from[j]) - most, T{});
  total = block_reduce(total, Sum{}, shared);
  if (threadIdx.x == 0) r.losses[row] = logf(total) + (most - hit);
  if (to == nullptr) return;
  const float share = r.scale / total;
  for (std::int64_t j = threadIdx.x; j < r.vocab; j += kThreads) {
    to[j] =
        from_float<T>(exponential(to_float(from[j]) - most, T{}) * share - (j == target ? r.scale : 0.0F));
  }
}

template <typename T, int kPacks>
void launch_rows(const Rows<T>& r, std::int64_t rows, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = kPacks * kThreads * 16;
  constexpr int kBlocks = kPacks <= 2 ? 2 : 1;  // of a multiprocessor
  check(cudaFuncSetAttribute(cross_entropy_rows<T, kPacks>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kBytes),
        "cross_entropy");
  const auto grid =
      static_cast<unsigned>(std::min<std::int64_t>(rows, std::int64_t{kBlocks} * multiprocessors));
  cross_entropy_rows<T, kPacks><<<grid, kThreads, kBytes, stream>>>(r, rows);
}

template <typename T>
void launch(const Rows<T>& r, std::int64_t rows, int multiprocessors, cudaStream_t stream) {
  constexpr std::int64_t kRow = static_cast<std::int64_t>(kThreads) * kPack<T>;
  const bool packed = packs<T>(r.logits, r.vocab) && packs<T>(r.gradient, r.vocab);
  constexpr std::int64_t kLargestStage = 8 * kThreads * 16, kOwnShared = 1024;
  const bool fits = r.vocab <= 4 * kRow || kLargestStage + kOwnShared <= most_shared_bytes();
  if (!packed || r.vocab > 8 * kRow || !fits) {
    cross_entropy_any<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(r);
  } else if (r.vocab > 4 * kRow) {
    launch_rows<T, 8>(r, rows, multiprocessors, stream);
  } else if (r.vocab > 2 * kRow) {
    launch_rows<T, 4>(r, rows, multiprocessors, stream);
  } else if (r.vocab > kRow) {
    launch_rows<T, 2>(r, rows, multiprocessors, stream);
  } else {
    launch_rows<T, 1>(r, rows, multiprocessors, stream);
  }
}

}  // namespace

void CudaBackend::cross_entropy(View losses, View gradient, ConstView logits, ConstView targets,
                                std::int64_t rows, std::int64_t vocab, double gradient_scale) {
  const char* op = "cross_entropy";
  if (vocab < 1) fail(op, "vocab", vocab, 1);
  for_compute_type(op, logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> r{output<float>(op, "losses", losses, rows),
                    optional_output<T>(op, "gradient", gradient, rows * vocab),
                    input<T>(op, "logits", logits, rows * vocab),
                    input<std::int32_t>(op, "targets", targets, rows),
                    vocab,
                    static_cast<float>(gradient_scale)};
    if (rows == 0) return;
    launch(r, rows, multiprocessors_, stream_);
    check_launch(op);
  });
}

}  // namespace fathom::cuda
