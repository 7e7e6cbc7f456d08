// Which rows a routed block keeps: the top K of each sequence, or those above a threshold.
#include <cuda_runtime.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/reduce.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kDigits = 256;

/// An unsigned integer that orders as the number does; both zeros are equal, and every NaN is the least.
__device__ __forceinline__ std::uint32_t key_of(float x) {
  constexpr std::uint32_t kSign = 0x80000000U;
  const std::uint32_t bits = __float_as_uint(x == 0.0F ? 0.0F : x);
  return x != x ? 0 : ((bits & kSign) != 0 ? ~bits : bits | kSign);
}

/// How a row compares with the last one kept.
enum class Standing { Below, Equal, Above };

struct Counts {
  int above, equal;
};

/// Writes first + t, ascending, for the t in [0, seq) that stand above and for the first `equals` of those
/// that are equal. Each warp has a run of t: it counts them, learns what the warps before it write, then
/// writes.
template <typename StandingOf>
__device__ void write_kept(std::int32_t* out, StandingOf standing_of, int first, int seq, int equals,
                           Counts* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int run = ((seq + kWarps - 1) / kWarps + 31) / 32 * 32;
  const int begin = min(warp * run, seq), end = min(begin + run, seq);
  Counts mine{0, 0};
  for (int base = begin; base < end; base += 32) {
    const Standing s = base + lane < end ? standing_of(base + lane) : Standing::Below;
    mine.above += __popc(__ballot_sync(kFullWarp, s == Standing::Above));
    mine.equal += __popc(__ballot_sync(kFullWarp, s == Standing::Equal));
  }
  if (lane == 0) shared[warp] = mine;
  __syncthreads();
  int above = __reduce_add_sync(kFullWarp, lane < warp ? shared[lane].above : 0);
  int equal = __reduce_add_sync(kFullWarp, lane < warp ? shared[lane].equal : 0);
  const unsigned lower_lanes = (1U << lane) - 1U;
  for (int base = begin; base < end; base += 32) {
    const Standing s = base + lane < end ? standing_of(base + lane) : Standing::Below;
    const unsigned above_lanes = __ballot_sync(kFullWarp, s == Standing::Above);
    const unsigned equal_lanes = __ballot_sync(kFullWarp, s == Standing::Equal);
    const int equal_before = equal + __popc(equal_lanes & lower_lanes);
    if (s == Standing::Above || (s == Standing::Equal && equal_before < equals)) {
      out[above + __popc(above_lanes & lower_lanes) + min(equal_before, equals)] = first + base + lane;
    }
    above += __popc(above_lanes);
    equal += __popc(equal_lanes);
  }
}

struct Kth {
  std::uint32_t key;  // of the last row kept
  int equals;         // how many rows with that key are kept
};

/// The keep-th largest key, a byte at a time (radix select). The histogram's integer atomics have one result
/// whatever their order.
template <typename KeyAt>
__device__ Kth kth_largest(KeyAt key_at, int seq, int keep) {
  __shared__ int counts[kDigits];
  __shared__ Kth found;  // key: the digit
  const int thread = static_cast<int>(threadIdx.x);
  std::uint32_t prefix = 0, mask = 0;
  int wanted = keep;  // how many of the keys with this prefix are kept
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (thread < kDigits) counts[thread] = 0;
    __syncthreads();
    for (int t = thread; t < seq; t += kThreads) {
      const std::uint32_t key = key_at(t);
      if ((key & mask) == prefix) atomicAdd(&counts[key >> shift & 0xffU], 1);
    }
    __syncthreads();
    if (thread < 32) {  // lane l has the 8 digits from 255 - 8 l down
      constexpr int kEach = kDigits / 32;
      int count[kEach], sum = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        count[i] = counts[kDigits - 1 - kEach * thread - i];
        sum += count[i];
      }
      int larger = sum;  // keys with a larger digit, once this lane's own are taken off the running sum
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const int other = __shfl_up_sync(kFullWarp, larger, offset);
        if (thread >= offset) larger += other;
      }
      larger -= sum;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (larger < wanted && wanted <= larger + count[i]) {  // true for one digit of one lane
          found = {static_cast<std::uint32_t>(kDigits - 1 - kEach * thread - i), wanted - larger};
        }
        larger += count[i];
      }
    }
    __syncthreads();
    prefix |= found.key << shift;
    mask |= 0xffU << shift;
    wanted = found.equals;
  }
  return {prefix, wanted};
}

/// A block a sequence. Its keys stay in shared memory; when it is too long for that, they are made anew from
/// the scores at every pass. Traffic: a read of the scores (six otherwise), a write of the indices; what it
/// takes is the latency of a dozen barriers.
template <bool kKeysInShared>
__global__ void __launch_bounds__(kThreads)
    top_k_kernel(std::int32_t* indices, const float* scores, int seq, int keep) {
  extern __shared__ std::uint32_t keys[];
  __shared__ Counts counts[kWarps];
  scores += std::int64_t{blockIdx.x} * seq;
  indices += std::int64_t{blockIdx.x} * keep;
  if constexpr (kKeysInShared) {
    for (int t = static_cast<int>(threadIdx.x); t < seq; t += kThreads) keys[t] = key_of(scores[t]);
    // The first barrier of kth_largest is before any thread reads another one's keys.
  }
  const auto key_at = [scores](int t) {
    if constexpr (kKeysInShared) {
      return keys[t];
    } else {
      return key_of(scores[t]);
    }
  };
  const Kth last = kth_largest(key_at, seq, keep);
  const auto standing_of = [key_at, last](int t) {
    const std::uint32_t key = key_at(t);
    return key > last.key ? Standing::Above : (key == last.key ? Standing::Equal : Standing::Below);
  };
  write_kept(indices, standing_of, static_cast<int>(blockIdx.x) * seq, seq, last.equals, counts);
}

/// Every thread gets the sum over the block, whose threads are all there.
__device__ int block_sum(int x, int* shared) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  x = __reduce_add_sync(kFullWarp, x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  return __reduce_add_sync(kFullWarp, shared[lane]);
}

/// The threshold is compared in double, as on the CPU.
struct AboveThreshold {
  const float* scores;  // [batch, seq]
  double threshold;
  int seq;
};

/// counts[b]: rows of sequence b above the threshold. Traffic: a read of the scores.
__global__ void __launch_bounds__(kThreads) count_above_kernel(int* counts, AboveThreshold a) {
  __shared__ int shared[kWarps];
  const float* scores = a.scores + std::int64_t{blockIdx.x} * a.seq;
  int count = 0;
  for (int t = static_cast<int>(threadIdx.x); t < a.seq; t += kThreads) {
    count += static_cast<double>(scores[t]) > a.threshold ? 1 : 0;
  }
  count = block_sum(count, shared);
  if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

/// Traffic: two reads of the scores (the second from cache), a write of the indices.
__global__ void __launch_bounds__(kThreads)
    write_above_kernel(std::int32_t* indices, std::int32_t* offsets, const int* counts, AboveThreshold a) {
  __shared__ int shared[kWarps];
  __shared__ Counts shared_counts[kWarps];
  const int sequence = static_cast<int>(blockIdx.x);
  int before = 0;
  for (int b = static_cast<int>(threadIdx.x); b < sequence; b += kThreads) before += counts[b];
  before = block_sum(before, shared);
  if (threadIdx.x == 0) {
    if (sequence == 0) offsets[0] = 0;
    offsets[sequence + 1] = before + counts[sequence];
  }
  const float* scores = a.scores + std::int64_t{sequence} * a.seq;
  const auto standing_of = [scores, a](int t) {
    return static_cast<double>(scores[t]) > a.threshold ? Standing::Above : Standing::Below;
  };
  write_kept(indices + before, standing_of, sequence * a.seq, a.seq, 0, shared_counts);
}

/// Row numbers are int32 throughout.
void check_rows(const char* op, std::int64_t batch, std::int64_t seq) {
  if (batch * seq > 0x7fffffff) fail(op, "B * T", batch * seq, 0x7fffffff);
}

}  // namespace

void CudaBackend::top_k_rows(View indices, ConstView scores, std::int64_t batch, std::int64_t seq,
                             std::int64_t keep) {
  const char* op = "top_k_rows";
  if (keep < 0 || keep > seq) fail(op, "keep", keep, seq);
  check_rows(op, batch, seq);
  auto* out = output<std::int32_t>(op, "indices", indices, batch * keep);
  const auto* in = input<float>(op, "scores", scores, batch * seq);
  if (batch == 0 || keep == 0) return;
  constexpr int kOwnShared = 4096;  // more than the kernel has besides the keys
  const std::int64_t most = most_shared_bytes();
  const auto blocks = static_cast<unsigned>(batch);
  const int t = static_cast<int>(seq), k = static_cast<int>(keep);
  const std::int64_t bytes = seq * static_cast<std::int64_t>(sizeof(std::uint32_t));
  if (bytes + kOwnShared > most) {
    top_k_kernel<false><<<blocks, kThreads, 0, stream()>>>(out, in, t, k);
  } else {
    check(cudaFuncSetAttribute(top_k_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(most) - kOwnShared),
          op);
    top_k_kernel<true><<<blocks, kThreads, static_cast<std::size_t>(bytes), stream()>>>(out, in, t, k);
  }
  check_launch(op);
}

std::int64_t CudaBackend::select_above(View indices, View offsets, ConstView scores, double threshold,
                                       std::int64_t batch, std::int64_t seq) {
  const char* op = "select_above";
  check_rows(op, batch, seq);
  auto* out = output<std::int32_t>(op, "indices", indices, batch * seq);
  auto* parts = output<std::int32_t>(op, "offsets", offsets, batch + 1);
  const AboveThreshold a{input<float>(op, "scores", scores, batch * seq), threshold, static_cast<int>(seq)};
  if (batch == 0) {
    check(cudaMemsetAsync(parts, 0, sizeof(std::int32_t), stream()), op);
    return 0;
  }
  int* counts = scratch_of<int>(batch);
  const auto blocks = static_cast<unsigned>(batch);
  count_above_kernel<<<blocks, kThreads, 0, stream()>>>(counts, a);
  check_launch(op);
  write_above_kernel<<<blocks, kThreads, 0, stream()>>>(out, parts, counts, a);
  check_launch(op);
  std::int32_t count = 0;
  copy_to_host(&count, parts + batch, sizeof(count));
  return count;
}

}  // namespace fathom::cuda
