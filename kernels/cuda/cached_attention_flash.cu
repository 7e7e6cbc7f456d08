// Flash attention of new rows over keys and values in a pool of blocks: 64 rows of the pass and one head are
// a block of threads, which walks over the entries that they see, 64 at a time, the next ones on their way
// while these are used.
//
// Rows of one sequence stand together, in the order of their entries, and all see its entries from the first
// to their own. A block of threads may have rows of several sequences: it then walks over the entries of one
// after another, and for rows of the others they are masked. Rows that come alone are better left to the
// split kernel: the walk over their entries would be made for one row of 64.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/cached_attention.h"
#include "kernels/cuda/device/cache_tiles.cuh"
#include "kernels/cuda/device/flash_forward.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/row_runs.cuh"

namespace fathom::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kKeys = 64;
constexpr int kQueries = 16 * kWarps;

struct Task {
  CachedRows<bf16> a;
  bool many;
};

template <int D>
constexpr std::size_t kSharedBytes = 4 * kKeys* D * sizeof(bf16);  // two stages of keys and values

/// Rows of the pass that are one sequence's.
struct Segment {
  int first, end;
  int entries;  // that its last row sees
};

/// The segment that begins with a row, up to row `end`: by a whole warp.
__device__ __forceinline__ Segment segment_at(const CachedRows<bf16>& a, int first, int end) {
  const std::int32_t sequence = a.sequences[first];
  int at = first + 1;
  while (at < end) {
    const int row = at + lane_id();
    const unsigned others = __ballot_sync(kFullWarp, row >= end || a.sequences[row] != sequence);
    if (others != 0) {
      at = min(end, at + __ffs(static_cast<int>(others)) - 1);
      break;
    }
    at += 32;
  }
  return {first, at, a.lengths[at - 1]};
}

/// Traffic: q and out once, keys and values once for every block of rows (from L2).
template <int D, int kBits>
__global__ void __launch_bounds__(kThreads, D == 64 ? 4 : 2) flash_kernel(const Task task) {
  const CachedRows<bf16>& a = task.a;
  extern __shared__ __align__(128) unsigned char shared_memory[];
  auto* const memory = reinterpret_cast<bf16*>(shared_memory);
  const CacheShape& s = a.s;
  const int heads = static_cast<int>(s.heads), rows = static_cast<int>(s.rows);
  const int d = static_cast<int>(s.head_dim);
  const int h = static_cast<int>(blockIdx.x) % heads;
  // The last rows of a prompt see the most entries: they go first.
  const int tile = static_cast<int>((gridDim.x - 1 - blockIdx.x) / static_cast<unsigned>(heads));
  const int begin = tile * kQueries, end = min(begin + kQueries, rows);
  const int g = h / (heads / static_cast<int>(s.kv_heads));
  const std::int64_t packed = (s.heads + 2 * s.kv_heads) * d;

  const int row = begin + static_cast<int>(threadIdx.x) / 32 * 16;  // this warp's first one
  QueryRows<D, 1> queries;
  queries.begin({a.qkv + static_cast<std::int64_t>(h) * d, packed, rows, d}, row);
  const float scale = static_cast<float>(s.scale);

#pragma unroll 1
  for (int from = begin; from < end;) {
    const Segment segment = segment_at(a, from, end);
    from = segment.end;
    if (task.many && !has_many_rows(a.sequences, rows, segment.first)) continue;
    const int sequence = a.sequences[segment.first];
    VisibleKeys visible[1] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int mine = row + lane_id() / 4 + 8 * half;
      const bool inside = mine >= segment.first && mine < segment.end;
      visible[0].last[half] = inside ? a.lengths[mine] - 1 : -1;
    }
    const bool takes_part = row < segment.end && row + 16 > segment.first;
    const bool whole = row >= segment.first && row + 16 <= segment.end;
    const int sees_all = whole ? a.lengths[row] : 0;  // entries that each of this warp's rows sees
    const int sees_any = takes_part ? a.lengths[min(row + 16, segment.end) - 1] : 0;
    const int last_block = (segment.entries - 1) / kKeys;
    const auto bring = [&](bf16* stage, int first) {
      if constexpr (kBits == 16) {
        copy_entries<D, kKeys, kThreads>(a, stage, sequence, g, first, segment.entries);
      } else {
        CodesOnTheWay<D, kBits, kKeys, kThreads> codes;
        codes.load(a, sequence, g, first, segment.entries);
        codes.store(stage);
      }
    };
    __syncthreads();  // the last segment's stages have been read
    bring(memory, 0);
#pragma unroll 1
    for (int block = 0; block <= last_block; ++block) {
      if (block < last_block) {
        bring(memory + (block + 1) % 2 * (2 * kKeys * D), (block + 1) * kKeys);
        wait_copies<1>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
      const SharedTile<D> stage{memory + block % 2 * (2 * kKeys * D)};
      constexpr int kPieces = 2;  // as many scores at a time as there are registers for
#pragma unroll 1
      for (int at = 0; at < kKeys; at += 16 * kPieces) {
        const int key = block * kKeys + at;
        if (key >= sees_any) break;
        queries.template see<kPieces>(stage.from_row(at), stage.from_row(kKeys + at), key,
                                      key + 16 * kPieces > sees_all, visible, scale * kLog2E);
      }
      __syncthreads();  // before the next copy overwrites this stage
    }
  }
  queries.finish({a.out + static_cast<std::int64_t>(h) * d, s.heads * s.head_dim, end, d}, nullptr, row,
                 scale);
}

template <int D>
void run(const CachedRows<bf16>& a, bool many, cudaStream_t stream) {
  const auto tiles = static_cast<unsigned>(blocks_for(a.s.rows, kQueries));
  for_cache_bits("cached_attention", a.s.bits, [&](auto bits) {
    launch("cached_attention", flash_kernel<D, bits>,
           {tiles * static_cast<unsigned>(a.s.heads), kThreads, kSharedBytes<D>}, stream, Task{a, many});
  });
}

}  // namespace

bool cached_flash_supports(const CacheShape& s) {
  return flash_supports({.head_dim = s.head_dim, .scale = s.scale});
}

void attend_cached_flash(const CachedRows<bf16>& a, bool many, cudaStream_t stream) {
  if (a.s.head_dim <= 64) {
    run<64>(a, many, stream);
  } else {
    run<128>(a, many, stream);
  }
}

}  // namespace fathom::cuda
