// Flash attention's forward for any sequence length and document masks: a block takes 64 or 128 queries of a
// head and walks over the keys that they see, 64 at a time, the next ones on their way while these are used.
#include <algorithm>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/device/attention_heads.cuh"
#include "kernels/cuda/device/flash_forward.cuh"
#include "kernels/cuda/device/launch.cuh"

namespace fathom::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kKeys = 64;
/// Tiles of 16 queries a warp, as many as there are registers for.
template <int D>
constexpr int kTiles = D == 64 ? 2 : 1;
template <int D>
constexpr int kQueries = 16 * kTiles<D>* kWarps;

template <int D>
constexpr std::size_t kSharedBytes = 4 * kKeys* D * sizeof(bf16);  // two stages of keys and values

struct Task {
  AttentionForward<bf16> a;
  int query_blocks;
};

/// Traffic: q and out once, k and v once for every block of queries (from L2), lse.
template <int D, bool kDocuments>
__global__ void __launch_bounds__(kThreads, D == 64 ? 3 : 2) forward_kernel(const Task task) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  auto* const memory = reinterpret_cast<bf16*>(shared_memory);
  const AttentionShape& s = task.a.shape;
  const int seq = static_cast<int>(s.seq), heads = static_cast<int>(s.heads);
  const int index = static_cast<int>(blockIdx.x);
  const int b = index / task.query_blocks / heads, h = index / task.query_blocks % heads;
  // The last queries see the most keys: they go first.
  const int query = (task.query_blocks - 1 - index % task.query_blocks) * kQueries<D>;
  const int kv = heads + h / (heads / static_cast<int>(s.kv_heads));
  const HeadRows keys = packed_head(task.a.qkv, s, b, kv);
  const HeadRows values = packed_head(task.a.qkv, s, b, kv + static_cast<int>(s.kv_heads));
  const std::int32_t* first_key =
      kDocuments ? task.a.first_key + static_cast<std::int64_t>(b) * seq : nullptr;

  const int first_block = kDocuments ? first_key[query] / kKeys : 0;
  const int last_query = min(query + kQueries<D>, seq) - 1;
  const int last_block = last_query / kKeys;
  const auto copy_block = [&](int block) {
    bf16* stage = memory + (block - first_block) % 2 * (2 * kKeys * D);
    copy_rows<D, kKeys, kThreads>({stage}, keys, block * kKeys);
    copy_rows<D, kKeys, kThreads>({stage + kKeys * D}, values, block * kKeys);
    commit_copies();
  };
  copy_block(first_block);

  constexpr int kRows = 16 * kTiles<D>;  // of a warp
  const int row = query + static_cast<int>(threadIdx.x) / 32 * kRows;
  QueryRows<D, kTiles<D>> rows;
  rows.begin(packed_head(task.a.qkv, s, b, h), row);
  VisibleKeys visible[kTiles<D>] = {};
#pragma unroll
  for (int t = 0; t < kTiles<D>; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      visible[t].last[half] = row + 16 * t + lane_id() / 4 + 8 * half;
      if (kDocuments) visible[t].first[half] = first_key[min(visible[t].last[half], seq - 1)];
    }
  }
  const int latest_start = kDocuments ? first_key[last_query] : 0;  // the greatest first key of the queries

  const float scale = static_cast<float>(s.scale);
  for (int block = first_block; block <= last_block; ++block) {
    if (block < last_block) {
      copy_block(block + 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const SharedTile<D> tile{memory + (block - first_block) % 2 * (2 * kKeys * D)};
    constexpr int kPieces = 2;  // as many scores at a time as there are registers for
#pragma unroll 1
    for (int at = 0; at < kKeys; at += 16 * kPieces) {
      const int key = block * kKeys + at;
      if (key > row + kRows - 1) break;  // after this warp's last query
      const bool masked = key + 16 * kPieces - 1 > row || (kDocuments && key < latest_start);
      rows.template see<kPieces>(tile.from_row(at), tile.from_row(kKeys + at), key, masked, visible,
                                 scale * kLog2E);
    }
    __syncthreads();  // before the next copy overwrites this stage
  }
  rows.finish(narrow_head(task.a.out, s, b, h), task.a.lse + (static_cast<std::int64_t>(b) * heads + h) * seq,
              row, scale);
}

template <int D>
void run(const AttentionForward<bf16>& a, cudaStream_t stream) {
  const Task task{a, static_cast<int>(blocks_for(a.shape.seq, kQueries<D>))};
  const LaunchSize size{static_cast<unsigned>(a.shape.batch * a.shape.heads * task.query_blocks), kThreads,
                        kSharedBytes<D>};
  launch("attention_forward", a.first_key == nullptr ? forward_kernel<D, false> : forward_kernel<D, true>,
         size, stream, task);
}

}  // namespace

bool flash_supports(const AttentionShape& s) {
  return s.head_dim % 8 == 0 && s.head_dim <= 128 && s.scale > 0;
}

void attend_flash(const AttentionForward<bf16>& a, cudaStream_t stream) {
  if (a.shape.head_dim <= 64) {
    run<64>(a, stream);
  } else {
    run<128>(a, stream);
  }
}

}  // namespace fathom::cuda
