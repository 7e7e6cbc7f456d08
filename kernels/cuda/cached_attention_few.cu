// Attention of some new rows of one sequence over keys and values in a pool of blocks, as speculative
// decoding checks them: 2 to 64 rows, which may see a long text. What counts is that keys and values are read
// once, by all of the device.
//
// The vectors of a key/value head are the queries of all rows and of all query heads that share it, row after
// row: 16 of them are a tile of the tensor core. A block of threads has up to four tiles and a piece of the
// entries, which it walks over 64 at a time, the next ones on their way while these are used. Its four warps
// share tiles and entries: with one tile each warp sees a quarter of the 64 entries, with two a half, with
// four all of them. What the warps found is joined in the order of the entries, and so are the pieces, by a
// second kernel: the same sums in every run.
#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "kernels/cuda/cached_attention.h"
#include "kernels/cuda/device/cache_tiles.cuh"
#include "kernels/cuda/device/flash_forward.cuh"
#include "kernels/cuda/device/launch.cuh"

namespace fathom::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kKeys = 64;
constexpr std::int64_t kMostRows = 64;
constexpr std::int64_t kMostVectors = 256;  // of a key/value head: beyond, prompts' kernel is as good
constexpr int kMostSplits = 256;

// Stages of keys and values, and the blocks of threads of a multiprocessor that have room for them.
template <int D, int kBits>
constexpr int kStages = kBits < 16 ? 2
                        : D == 64  ? 4
                                   : 3;
template <int D>
constexpr int kBlocks = D == 64 ? 3 : 2;
template <int D, int kBits>
constexpr std::size_t kSharedBytes = kStages<D, kBits> * 2 * kKeys* D * sizeof(bf16);

constexpr int tiles_of(std::int64_t vectors) { return vectors <= 16 ? 1 : vectors <= 32 ? 2 : 4; }
std::int64_t vectors_of(const CacheShape& s) { return s.rows * (s.heads / s.kv_heads); }
/// Blocks of threads that a piece of a head's entries takes.
std::int64_t parts_of(const CacheShape& s) {
  const std::int64_t vectors = vectors_of(s);
  return blocks_for(vectors, 16 * tiles_of(vectors));
}

struct FewTask {
  CachedRows<bf16> a;
  int splits;
  float* parts;     // [rows*H][splits][d]: values, divided by their sum
  float2* weights;  // the greatest score, with log2(e), and the sum of exponentials, [rows*H][splits]
};

/// What the warps leave for each other when all entries have been seen.
template <int D>
struct Found {
  static constexpr int kStride = D + 8;  // rows of a tile that are written at once lie in different banks
  float values[kWarps][16][kStride];
  float2 weights[kWarps][16];
};

/// Traffic: keys and values once (for each 64 vectors).
template <int D, int kBits, int kTiles>
__global__ void __launch_bounds__(kThreads, kBlocks<D>) few_kernel(const FewTask t) {
  static_assert(sizeof(Found<D>) <= kSharedBytes<D, kBits>);
  constexpr int kPieces = kTiles == 1 ? 1 : 2;     // sixteens of entries at a time,
  constexpr int kShare = kKeys * kTiles / kWarps;  // of those that a warp sees of a stage
  constexpr int kStageSize = 2 * kKeys * D;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  auto* const memory = reinterpret_cast<bf16*>(shared_memory);
  const CachedRows<bf16>& a = t.a;
  const CacheShape& s = a.s;
  const int rows = static_cast<int>(s.rows), kv_heads = static_cast<int>(s.kv_heads);
  const int group = static_cast<int>(s.heads) / kv_heads, vectors = rows * group;
  const int split = static_cast<int>(blockIdx.x) % t.splits, item = static_cast<int>(blockIdx.x) / t.splits;
  const int g = item % kv_heads, first_tile = item / kv_heads * kTiles;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_id();
  const int first = (first_tile + warp % kTiles) * 16;  // this warp's first vector
  const int sequence = a.sequences[0], entries = a.lengths[rows - 1];
  const int blocks = (entries + kKeys - 1) / kKeys, each = (blocks + t.splits - 1) / t.splits;
  const int begin = min(split * each, blocks), end = min(begin + each, blocks);

  QueryRows<D, 1> queries;
  const std::int64_t packed = (s.heads + 2 * s.kv_heads) * D;
  load_a_rows_at<D>(
      queries.q[0],
      [&](int m) {
        return m < vectors ? a.qkv + m / group * packed + static_cast<std::int64_t>(g * group + m % group) * D
                           : nullptr;
      },
      D, first);
  queries.begin();
  VisibleKeys visible[1] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int m = first + lane / 4 + 8 * half;
    visible[0].last[half] = m < vectors ? a.lengths[m / group] - 1 : -1;
  }
  // Entries that each of this warp's vectors sees, and that any of them does.
  const int sees_all = first < vectors ? a.lengths[first / group] : 0;
  const int sees_any = first < vectors ? a.lengths[min(first + 15, vectors - 1) / group] : 0;
  const float scale = static_cast<float>(s.scale) * kLog2E;

  const auto stage_at = [&](int block) { return memory + (block - begin) % kStages<D, kBits> * kStageSize; };
  const auto see = [&](int block) {
    const SharedTile<D> stage{stage_at(block)};
#pragma unroll 1
    for (int i = 0; i < kShare; i += 16 * kPieces) {
      const int at = warp / kTiles * kShare + i, key = block * kKeys + at;
      if (key >= sees_any) break;
      queries.template see<kPieces>(stage.from_row(at), stage.from_row(kKeys + at), key,
                                    key + 16 * kPieces > sees_all, visible, scale);
    }
  };
  if constexpr (kBits == 16) {
    constexpr int kAhead = kStages<D, kBits> - 1;
    const auto bring = [&](int block) {
      if (block < end) {
        copy_entries<D, kKeys, kThreads>(a, stage_at(block), sequence, g, block * kKeys, entries);
      } else {
        commit_copies();  // they are waited for by their number
      }
    };
#pragma unroll 1
    for (int i = 0; i < kAhead; ++i) bring(begin + i);
#pragma unroll 1
    for (int block = begin; block < end; ++block) {
      wait_copies<kAhead - 1>();
      __syncthreads();  // this stage is there, and the one before has been read
      bring(block + kAhead);
      see(block);
    }
    wait_copies<0>();
  } else {
    CodesOnTheWay<D, kBits, kKeys, kThreads> codes;
    if (begin < end) {
      codes.load(a, sequence, g, begin * kKeys, entries);
      codes.store(stage_at(begin));
    }
#pragma unroll 1
    for (int block = begin; block < end; ++block) {
      const bool more = block + 1 < end;
      if (more) codes.load(a, sequence, g, (block + 1) * kKeys, entries);
      __syncthreads();  // this stage is there, and the one before has been read
      see(block);
      if (more) codes.store(stage_at(block + 1));
    }
  }

  __syncthreads();
  auto& found = *reinterpret_cast<Found<D>*>(shared_memory);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = lane / 4 + 8 * half;
    float sum = queries.sum[0][half];
    sum += __shfl_xor_sync(kFullWarp, sum, 1);
    sum += __shfl_xor_sync(kFullWarp, sum, 2);
    if (lane % 4 == 0) found.weights[warp][r] = float2{queries.max[0][half] * scale, sum};
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
      *reinterpret_cast<float2*>(&found.values[warp][r][8 * n + lane % 4 * 2]) =
          float2{queries.out[0][n][2 * half], queries.out[0][n][2 * half + 1]};
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kTiles * 16 * D; i += kThreads) {
    const int tile = i / (16 * D), r = i / D % 16, e = i % D, m = (first_tile + tile) * 16 + r;
    if (m >= vectors) break;  // and so are those behind
    float most = -INFINITY, sum = 0, value = 0;
#pragma unroll
    for (int w = tile; w < kWarps; w += kTiles) most = fmaxf(most, found.weights[w][r].x);
#pragma unroll
    for (int w = tile; w < kWarps; w += kTiles) {
      const float2 weight = found.weights[w][r];
      if (weight.y == 0) continue;  // it saw no entry
      const float factor = fast_exp2(weight.x - most);
      sum = fmaf(factor, weight.y, sum);
      value = fmaf(factor, found.values[w][r][e], value);
    }
    // A piece may have no entries that the vector sees. What is not a number stays that.
    value = sum != 0 ? value / sum : 0.0F;
    const std::int64_t of = m / group * s.heads + g * group + m % group;
    if (t.splits == 1) {
      a.out[of * D + e] = __float2bfloat16_rn(value);
    } else {
      t.parts[(of * t.splits + split) * D + e] = value;
      if (e == 0) t.weights[of * t.splits + split] = float2{most, sum};
    }
  }
}

/// The pieces of a row's head, joined: a block of threads for each, a thread an element.
template <int D>
__global__ void __launch_bounds__(D) join_kernel(const FewTask t) {
  __shared__ float factors[kMostSplits];
  __shared__ float room[32];
  const std::int64_t of = blockIdx.x;
  const float2* const weights = t.weights + of * t.splits;
  const float* const parts = t.parts + of * t.splits * D + threadIdx.x;
  float most = -INFINITY, sum = 0, value = 0;
  for (int i = static_cast<int>(threadIdx.x); i < t.splits; i += D) most = fmaxf(most, weights[i].x);
  most = block_reduce(most, Max{}, room);
  for (int i = static_cast<int>(threadIdx.x); i < t.splits; i += D) {
    const float2 w = weights[i];
    factors[i] = w.y == 0 ? 0.0F : fast_exp2(w.x - most) * w.y;
    sum += factors[i];
  }
  sum = block_reduce(sum, Sum{}, room);
#pragma unroll 8
  for (int i = 0; i < t.splits; ++i) value = fmaf(factors[i], parts[static_cast<std::int64_t>(i) * D], value);
  t.a.out[of * D + threadIdx.x] = __float2bfloat16_rn(value / sum);
}

template <int D, int kTiles>
void run(const FewTask& t, cudaStream_t stream) {
  const CacheShape& s = t.a.s;
  const auto blocks = static_cast<unsigned>(s.kv_heads * parts_of(s) * t.splits);
  for_cache_bits("cached_attention", s.bits, [&](auto bits) {
    launch("cached_attention", few_kernel<D, bits, kTiles>, {blocks, kThreads, kSharedBytes<D, bits>}, stream,
           t);
  });
  if (t.splits == 1) return;
  launch("cached_attention", join_kernel<D>, {static_cast<unsigned>(s.rows * s.heads), D, 0}, stream, t);
}

template <int D>
void run(const FewTask& t, cudaStream_t stream) {
  const int tiles = tiles_of(vectors_of(t.a.s));
  if (tiles == 1) {
    run<D, 1>(t, stream);
  } else if (tiles == 2) {
    run<D, 2>(t, stream);
  } else {
    run<D, 4>(t, stream);
  }
}

}  // namespace

bool cached_few_wanted() {
  const char* given = std::getenv("FATHOM_FEW_ROWS");
  return given == nullptr || std::string_view(given) != "0";
}

bool cached_few_supports(const CacheShape& s) {
  return s.sequences == 1 && s.rows >= 2 && s.rows <= kMostRows && vectors_of(s) <= kMostVectors &&
         (s.head_dim == 64 || s.head_dim == 128);
}

int cached_few_splits(const CacheShape& s, int multiprocessors) {
  const std::int64_t blocks = multiprocessors * (s.head_dim == 64 ? kBlocks<64> : kBlocks<128>);
  const std::int64_t stages = blocks_for(s.table * s.block, kKeys);  // of the longest row, at the most
  return static_cast<int>(std::clamp<std::int64_t>(
      std::min(blocks / std::max<std::int64_t>(1, s.kv_heads * parts_of(s)), stages / 2), 1, kMostSplits));
}

std::size_t cached_few_floats(const CacheShape& s, int splits) {
  return splits == 1 ? 0 : static_cast<std::size_t>(s.rows * s.heads * splits * (s.head_dim + 2));
}

void attend_cached_few(const CachedRows<bf16>& a, int splits, float* scratch, cudaStream_t stream) {
  const FewTask t{a, splits, scratch + 2 * a.s.rows * a.s.heads * splits, reinterpret_cast<float2*>(scratch)};
  if (a.s.head_dim == 64) {
    run<64>(t, stream);
  } else {
    run<128>(t, stream);
  }
}

}  // namespace fathom::cuda
