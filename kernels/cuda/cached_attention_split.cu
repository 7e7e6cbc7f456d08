// Attention of single new rows over keys and values in a pool of blocks, as a step of decoding has them: a
// block of threads has one row, the query heads of one key/value head, and a piece of the row's entries,
// which it reads once. Where rows and heads are few, a row's entries are cut into more pieces, and a second
// kernel joins them.
//
// The walk over the entries is the one of a decoding step (device/entry_walk.cuh), or its sister over codes
// (device/code_walk.cuh).
#include <algorithm>

#include "kernels/cuda/cached_attention.h"
#include "kernels/cuda/device/code_walk.cuh"
#include "kernels/cuda/device/entry_walk.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/row_runs.cuh"

namespace fathom::cuda {

namespace {

constexpr float kLog2 = 1.4426950408889634F;  // exponentials are powers of two

struct WalkedCache {
  const bf16* pool;
  int block, kv_heads;
};

struct SplitTask {
  CachedRows<bf16> a;
  bool few;
  int splits;
  float scale;      // of the scores, with log2(e)
  float* parts;     // [rows*H][splits][d]: values, divided by their sum
  float2* weights;  // the greatest score and the sum, [rows*H][splits]
};

/// Traffic: keys and values once.
template <int D, int kBits>
__global__ void __launch_bounds__(kDecodeThreads, 2) split_kernel(const SplitTask t) {
  __shared__ AttentionRoom<D> room;
  const CacheShape& s = t.a.s;
  const int heads = static_cast<int>(s.heads), kv_heads = static_cast<int>(s.kv_heads),
            group = heads / kv_heads;
  const int item = static_cast<int>(blockIdx.x) / t.splits, split = static_cast<int>(blockIdx.x) % t.splits;
  const int row = item / kv_heads, head = item % kv_heads;
  if (t.few && has_many_rows(t.a.sequences, static_cast<int>(s.rows), row)) return;
  const int entries = t.a.lengths[row], steps = (entries + 15) / 16;
  const int each = (steps + t.splits - 1) / t.splits, first = min(split * each, steps);
  const StepRange range{first, min(first + each, steps)};

  const WalkedCache cache{t.a.pool, static_cast<int>(s.block), kv_heads};
  const std::int32_t* const table = t.a.tables + t.a.sequences[row] * s.table;
  auto walk = [&] {
    if constexpr (kBits == 16) {
      return EntryWalk<D, WalkedCache>(cache, table, static_cast<int>(s.stride), static_cast<int>(s.offset),
                                       head);
    } else {
      return CodeWalk<D, kBits, 1, 0>(WalkedCodes{t.a.codes, static_cast<int>(s.block), kv_heads, table,
                                                  static_cast<int>(s.stride), static_cast<int>(s.offset),
                                                  head});
    }
  }();
  walk.begin(range, entries);
  const bf16* const queries = t.a.qkv + static_cast<std::int64_t>(row) * (heads + 2 * kv_heads) * D +
                              static_cast<std::int64_t>(head) * group * D;
  for (int i = static_cast<int>(threadIdx.x); i < group * D; i += kDecodeThreads)
    room.queries[i / D * AttentionRoom<D>::kStride + i % D] = queries[i];
  __syncthreads();
  if constexpr (kBits == 16) {
    walk.run(room.queries, group, range, entries, t.scale);
  } else {
    walk.run(room.queries, group, t.scale);
  }
  walk.leave(room, static_cast<int>(threadIdx.x) / 32, group);
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < group * D; i += kDecodeThreads) {
    const int h = i / D, e = i % D;
    float most = -INFINITY, sum = 0, value = 0;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) most = fmaxf(most, room.max[w][h]);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      if (room.max[w][h] == -INFINITY) continue;  // no step: no values
      const float weight = fast_exp2(room.max[w][h] - most);
      sum = fmaf(weight, room.sum[w][h], sum);
      value = fmaf(weight, room.values_of(w, h)[e], value);
    }
    // No entries in this piece; of a row's only one there are some, and what is not a number stays that.
    value = t.splits == 1 || sum != 0 ? value / sum : 0.0F;
    const std::int64_t of = static_cast<std::int64_t>(row) * heads + head * group + h;
    if (t.splits == 1) {
      t.a.out[of * D + e] = __float2bfloat16_rn(value);
    } else {
      t.parts[(of * t.splits + split) * D + e] = value;
      if (e == 0) t.weights[of * t.splits + split] = float2{most, sum};
    }
  }
}

/// The pieces of a row's head, joined: a block of threads for each, a thread an element.
template <int D>
__global__ void __launch_bounds__(D) join_kernel(const SplitTask t) {
  const std::int64_t of = blockIdx.x;
  const int row = static_cast<int>(of / t.a.s.heads);
  if (t.few && has_many_rows(t.a.sequences, static_cast<int>(t.a.s.rows), row)) return;
  const float2* const weights = t.weights + of * t.splits;
  const float* const parts = t.parts + of * t.splits * D + threadIdx.x;
  float most = -INFINITY, sum = 0, value = 0;
  for (int i = 0; i < t.splits; ++i) most = fmaxf(most, weights[i].x);
  for (int i = 0; i < t.splits; ++i) {
    const float2 w = weights[i];
    if (w.y == 0) continue;  // no entries
    const float weight = fast_exp2(w.x - most) * w.y;
    sum += weight;
    value = fmaf(weight, parts[static_cast<std::int64_t>(i) * D], value);
  }
  t.a.out[of * D + threadIdx.x] = __float2bfloat16_rn(value / sum);
}

template <int D>
void run(const SplitTask& t, cudaStream_t stream) {
  const auto items = static_cast<unsigned>(t.a.s.rows * t.a.s.kv_heads);
  for_cache_bits("cached_attention", t.a.s.bits, [&](auto bits) {
    launch("cached_attention", split_kernel<D, bits>,
           {items * static_cast<unsigned>(t.splits), kDecodeThreads, 0}, stream, t);
  });
  if (t.splits == 1) return;
  launch("cached_attention", join_kernel<D>, {static_cast<unsigned>(t.a.s.rows * t.a.s.heads), D, 0}, stream,
         t);
}

}  // namespace

bool cached_split_supports(const CacheShape& s) {
  return (s.head_dim == 64 || s.head_dim == 128) && s.heads / s.kv_heads <= kDecodeGroup;
}

int cached_splits(const CacheShape& s, int multiprocessors) {
  constexpr std::int64_t kMost = 128, kEntriesOfAStep = 16, kMostFloats = std::int64_t{1} << 24;
  // A sequence has one row here, or it is another kernel's.
  const std::int64_t items = std::max<std::int64_t>(1, std::min(s.rows, s.sequences) * s.kv_heads);
  const std::int64_t steps = s.table * s.block / kEntriesOfAStep;  // of the longest row, at the most
  const std::int64_t room = kMostFloats / std::max<std::int64_t>(1, s.rows * s.heads * (s.head_dim + 2));
  return static_cast<int>(std::clamp<std::int64_t>(
      std::min<std::int64_t>({4LL * multiprocessors / items, steps / kDecodeWarps, room}), 1, kMost));
}

std::size_t cached_split_floats(const CacheShape& s, int splits) {
  return splits == 1 ? 0 : static_cast<std::size_t>(s.rows * s.heads * splits * (s.head_dim + 2));
}

void attend_cached_split(const CachedRows<bf16>& a, bool few, int splits, float* scratch,
                         cudaStream_t stream) {
  auto* const weights = reinterpret_cast<float2*>(scratch);
  const SplitTask t{
      a,      few, splits, static_cast<float>(a.s.scale) * kLog2, scratch + 2 * a.s.rows * a.s.heads * splits,
      weights};
  if (a.s.head_dim == 64) {
    run<64>(t, stream);
  } else {
    run<128>(t, stream);
  }
}

}  // namespace fathom::cuda
