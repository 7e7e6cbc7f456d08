// Softmax, cross-entropy and its gradient in one pass over the logits: a block holds a row in registers.
#include <algorithm>
#include <cmath>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/row_packs.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 1024;  // of a block that takes a row of any length

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
  for (std::int64_t j = threadIdx.x; j < vocab; j += blockDim.x) to[j] = from_float<T>(0.0F);
}

/// The largest of a pack's elements; NaN where all are.
__device__ __forceinline__ float largest(const uint4& raw, float) {
  return fmaxf(fmaxf(__uint_as_float(raw.x), __uint_as_float(raw.y)),
               fmaxf(__uint_as_float(raw.z), __uint_as_float(raw.w)));
}
__device__ __forceinline__ __nv_bfloat162 two_of(unsigned bits) {
  return *reinterpret_cast<const __nv_bfloat162*>(&bits);
}
__device__ __forceinline__ float largest(const uint4& raw, bf16) {
  const __nv_bfloat162 two =
      __hmax2(__hmax2(two_of(raw.x), two_of(raw.y)), __hmax2(two_of(raw.z), two_of(raw.w)));
  return fmaxf(__low2float(two), __high2float(two));
}

/// Softmax of a row, times the gradient's scale: first the sum of exp(x - most), then the shares. In bf16 the
/// sum goes into the second exponent, so that a share is one multiply-add and one exponential:
/// |scale| 2^(x / ln 2 - (most / ln 2 + log2 sum)).
template <typename T>
class Softmax {
 public:
  __device__ __forceinline__ explicit Softmax(float most) : most_(most) {}
  __device__ __forceinline__ float exponential(float x) const { return expf(x - most_); }
  __device__ __forceinline__ void divide_by(float total, float scale) { factor_ = scale / total; }
  __device__ __forceinline__ float share(float x) const { return expf(x - most_) * factor_; }

 private:
  float most_, factor_ = 0.0F;
};
template <>
class Softmax<bf16> {
 public:
  __device__ __forceinline__ explicit Softmax(float most) : offset_(-most * kPerLog) {}
  __device__ __forceinline__ float exponential(float x) const { return fast_exp2(fmaf(x, kPerLog, offset_)); }
  __device__ __forceinline__ void divide_by(float total, float scale) {
    offset_ += log2f(fabsf(scale) / total);
    sign_ = __float_as_uint(scale) & 0x80000000U;
  }
  __device__ __forceinline__ float share(float x) const {
    return __uint_as_float(__float_as_uint(exponential(x)) ^ sign_);
  }

 private:
  static constexpr float kPerLog = 1.4426950408889634F;  // 1 / ln 2
  float offset_;
  unsigned sign_ = 0;
};

/// For rows of up to kPacks * kRowThreads packs, whole packs. A block walks over rows; while it computes one,
/// the next is on its way to shared memory, where each thread finds the packs that it asked for itself. Of
/// the blocks that share a multiprocessor one computes while another's row comes in or goes out. Reads the
/// logits once, writes the gradient once. The last rows come first: a product has just written them.
template <typename T, int kRowThreads, int kPacks, int kBlocks>
__global__ void __launch_bounds__(kRowThreads, kBlocks) cross_entropy_rows(Rows<T> r, std::int64_t rows) {
  constexpr int kN = kPack<T>;
  extern __shared__ __align__(16) unsigned char memory[];
  uint4* const stage = reinterpret_cast<uint4*>(memory) + threadIdx.x;
  __shared__ float shared[32];
  const int packs = static_cast<int>(r.vocab / kN), thread = static_cast<int>(threadIdx.x);
  const auto ask_for = [&](std::int64_t row) {
    if (row >= 0) {
      const T* from = r.logits + row * r.vocab;
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        const int slot = k * kRowThreads + thread;
        if (slot < packs) copy_async(stage + k * kRowThreads, from + slot * kN, true);
      }
    }
    commit_copies();
  };
  const std::int64_t first = rows - 1 - blockIdx.x;
  ask_for(first);
  std::int32_t next_target = first >= 0 ? r.targets[first] : 0;
  for (std::int64_t row = first; row >= 0; row -= gridDim.x) {
    const std::int32_t target = next_target;
    const std::int64_t next = row - gridDim.x;
    if (next >= 0) next_target = r.targets[next];
    T* to = r.gradient == nullptr ? nullptr : r.gradient + row * r.vocab;
    wait_copies<0>();
    if (target < 0 || target >= r.vocab) {  // outside of the vocabulary: it cannot be reported from here
      ask_for(next);
      if (thread == 0) r.losses[row] = target < 0 ? 0.0F : NAN;
      if (to != nullptr) zero_row(to, r.vocab);
      continue;
    }
    const float hit = thread == 0 ? to_float(r.logits[row * r.vocab + target]) : 0.0F;
    uint4 held[kPacks];
    float most = -INFINITY;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (k * kRowThreads + thread >= packs) continue;
      held[k] = stage[k * kRowThreads];
      most = fmaxf(most, largest(held[k], T{}));
    }
    ask_for(next);
    most = block_reduce(most, Max{}, shared);
    Softmax<T> softmax(most);
    float total = 0.0F;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (k * kRowThreads + thread >= packs) continue;
      const Pack<T> x = unpack<T>(held[k]);
#pragma unroll
      for (int e = 0; e < kN; ++e) total += softmax.exponential(x.v[e]);
    }
    total = block_reduce(total, Sum{}, shared);
    if (thread == 0) r.losses[row] = logf(total) + (most - hit);
    if (to == nullptr) continue;
    softmax.divide_by(total, r.scale);
    const int target_pack = target / kN;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int slot = k * kRowThreads + thread;
      if (slot >= packs) continue;
      Pack<T> g = unpack<T>(held[k]);
#pragma unroll
      for (int e = 0; e < kN; ++e) g.v[e] = softmax.share(g.v[e]);
      if (slot == target_pack) {
#pragma unroll
        for (int e = 0; e < kN; ++e) g.v[e] -= slot * kN + e == target ? r.scale : 0.0F;
      }
      store_raw(to + slot * kN, repack(g));
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

template <int kRowThreads, int kPacks, int kBlocks, typename T>
void launch_rows(const Rows<T>& r, std::int64_t rows, int multiprocessors, cudaStream_t stream) {
  constexpr int kBytes = kPacks * kRowThreads * 16;
  const auto kernel = cross_entropy_rows<T, kRowThreads, kPacks, kBlocks>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes), "cross_entropy");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100), "cross_entropy");
  const auto grid =
      static_cast<unsigned>(std::min<std::int64_t>(rows, std::int64_t{kBlocks} * multiprocessors));
  kernel<<<grid, kRowThreads, kBytes, stream>>>(r, rows);
}

template <typename T>
void launch(const Rows<T>& r, std::int64_t rows, int multiprocessors, cudaStream_t stream) {
  constexpr std::int64_t kLargestStage = 8 * kThreads * 16, kOwnShared = 1024;
  const bool packed = packs<T>(r.logits, r.vocab) && packs<T>(r.gradient, r.vocab);
  const std::int64_t count = r.vocab / kPack<T>;
  const bool fits = count <= 4 * kThreads || kLargestStage + kOwnShared <= most_shared_bytes();
  if (!packed || count > 8 * kThreads || !fits) {
    cross_entropy_any<T><<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(r);
  } else if (count > 4 * kThreads) {
    launch_rows<1024, 8, 1>(r, rows, multiprocessors, stream);
  } else if (count > 2 * kThreads) {
    launch_rows<512, 8, 2>(r, rows, multiprocessors, stream);
  } else if (count > kThreads) {
    launch_rows<512, 4, 2>(r, rows, multiprocessors, stream);
  } else {
    launch_rows<512, 2, 3>(r, rows, multiprocessors, stream);
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
