// Flash attention's backward for any sequence length and document masks, without atomics: one kernel gives dk
// and dv, a block for 64 keys; another gives dq, a block for 64 queries. Both compute the probabilities from
// lse: 7 products where 5 would do, which is the price of sums in a fixed order.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/device/attention_heads.cuh"
#include "kernels/cuda/device/flash_backward.cuh"
#include "kernels/cuda/device/launch.cuh"

namespace fathom::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kRows = 16 * kWarps;  // of a block of queries or of keys

struct Task {
  AttentionBackward<bf16> a;
  int blocks;  // of 64 rows in a sequence
};

/// What the queries of a block need besides their rows, in shared memory, for both stages.
struct StagedStatistics {
  float lse2[2][kRows];
  float delta[2][kRows];
  std::int32_t first_key[2][kRows];
};

template <int D>
constexpr std::size_t kSharedBytes = 6 * kRows* D * sizeof(bf16) + sizeof(StagedStatistics);

/// A head's statistics in global memory.
struct HeadStatistics {
  const float* lse;
  const float* delta;
  const std::int32_t* first_key;  // null without documents

  __device__ __forceinline__ static HeadStatistics of(const AttentionBackward<bf16>& a, int b, int h) {
    const std::int64_t at = (b * a.shape.heads + h) * a.shape.seq;
    return {a.lse + at, a.delta + at, a.first_key == nullptr ? nullptr : a.first_key + b * a.shape.seq};
  }
};

/// The first `kRows` threads copy the statistics of the queries from `query` on.
__device__ __forceinline__ void stage_statistics(StagedStatistics& to, int stage, const HeadStatistics& from,
                                                 int query, int seq) {
  const int i = static_cast<int>(threadIdx.x), t = query + i;
  if (i >= kRows) return;
  to.lse2[stage][i] = t < seq ? from.lse[t] * kLog2E : INFINITY;
  to.delta[stage][i] = t < seq ? from.delta[t] : 0.0F;
  if (from.first_key != nullptr) to.first_key[stage][i] = t < seq ? from.first_key[t] : 0;
}

/// The number of blocks, from the first on, that begin with a query whose document begins at `key` or before:
/// first keys do not decrease.
__device__ __forceinline__ int blocks_seeing(const std::int32_t* first_key, int key, int blocks) {
  int low = 0, high = blocks;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (first_key[middle * kRows] <= key) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Traffic: k, v, dk and dv once; q, dout, lse and delta once for every 64 keys (from L2).
template <int D, bool kDocuments>
__global__ void __launch_bounds__(kThreads, 2) key_gradients_kernel(const Task task) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const SharedTile<D> key_tile{reinterpret_cast<bf16*>(shared_memory)};
  const SharedTile<D> value_tile = key_tile.from_row(kRows);
  auto& staged = *reinterpret_cast<StagedStatistics*>(key_tile.from_row(6 * kRows).data);
  const AttentionShape& s = task.a.shape;
  const int seq = static_cast<int>(s.seq), heads = static_cast<int>(s.heads);
  const int kv_heads = static_cast<int>(s.kv_heads), group = heads / kv_heads;
  // The first keys are seen by the most queries: they go first.
  const int key_block = static_cast<int>(blockIdx.x) % task.blocks;
  const int b = static_cast<int>(blockIdx.x) / task.blocks / kv_heads;
  const int kv = static_cast<int>(blockIdx.x) / task.blocks % kv_heads;
  const int key = key_block * kRows, warp_key = key + static_cast<int>(threadIdx.x) / 32 * 16;
  const SharedTile<D> warp_keys = key_tile.from_row(warp_key - key);
  const SharedTile<D> warp_values = value_tile.from_row(warp_key - key);
  const float scale = static_cast<float>(s.scale);

  int end_block = task.blocks;
  if (kDocuments) {
    end_block =
        blocks_seeing(task.a.first_key + static_cast<std::int64_t>(b) * seq, key + kRows - 1, end_block);
  }
  const int blocks = end_block - key_block;  // at least the diagonal one
  const int steps = blocks * group;
  const auto copy_step = [&](int step) {
    const int h = kv * group + step / blocks, query = (key_block + step % blocks) * kRows;
    const SharedTile<D> tile = key_tile.from_row((2 + step % 2 * 2) * kRows);
    copy_rows<D, kRows, kThreads>(tile, packed_head(task.a.qkv, s, b, h), query);
    copy_rows<D, kRows, kThreads>(tile.from_row(kRows), narrow_head(task.a.dout, s, b, h), query);
    commit_copies();
    stage_statistics(staged, step % 2, HeadStatistics::of(task.a, b, h), query, seq);
  };
  copy_rows<D, kRows, kThreads>(key_tile, packed_head(task.a.qkv, s, b, heads + kv), key);
  copy_rows<D, kRows, kThreads>(value_tile, packed_head(task.a.qkv, s, b, heads + kv_heads + kv), key);
  copy_step(0);

  KeyGradients<D, 1> gradients;
  gradients.clear();
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) {
      copy_step(step + 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const int stage = step % 2, block_query = (key_block + step % blocks) * kRows;
    const SharedTile<D> queries = key_tile.from_row((2 + stage * 2) * kRows), douts = queries.from_row(kRows);
#pragma unroll 1
    for (int i = 0; i < kRows; i += 16) {
      const int query = block_query + i;
      if (query + 15 < warp_key) continue;
      std::uint32_t ds[1][4];
      const QueryStatistics statistics{staged.lse2[stage] + i, staged.delta[stage] + i,
                                       kDocuments ? staged.first_key[stage] + i : nullptr};
      gradients.add(warp_keys, warp_values, warp_key, queries.from_row(i), douts.from_row(i), query,
                    statistics, scale * kLog2E, ds);
    }
    __syncthreads();  // before the next copy overwrites this stage
  }
  gradients.store(packed_head(task.a.dqkv, s, b, heads + kv),
                  packed_head(task.a.dqkv, s, b, heads + kv_heads + kv), warp_key, scale);
}

/// Traffic: q, dout, lse, delta and dq once; k and v once for every 64 queries (from L2).
template <int D, bool kDocuments>
__global__ void __launch_bounds__(kThreads, 2) query_gradients_kernel(const Task task) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const SharedTile<D> query_tile{reinterpret_cast<bf16*>(shared_memory)};
  const SharedTile<D> dout_tile = query_tile.from_row(kRows);
  const AttentionShape& s = task.a.shape;
  const int seq = static_cast<int>(s.seq), heads = static_cast<int>(s.heads);
  const int index = static_cast<int>(blockIdx.x);
  const int b = index / task.blocks / heads, h = index / task.blocks % heads;
  // The last queries see the most keys: they go first.
  const int last_block = task.blocks - 1 - index % task.blocks;
  const int warp_row = static_cast<int>(threadIdx.x) / 32 * 16, row = last_block * kRows + warp_row;
  const int kv = heads + h / (heads / static_cast<int>(s.kv_heads));
  const HeadRows keys = packed_head(task.a.qkv, s, b, kv);
  const HeadRows values = packed_head(task.a.qkv, s, b, kv + static_cast<int>(s.kv_heads));
  const HeadStatistics statistics = HeadStatistics::of(task.a, b, h);
  const int first_block = kDocuments ? statistics.first_key[last_block * kRows] / kRows : 0;
  const auto copy_block = [&](int block) {
    const SharedTile<D> tile = query_tile.from_row((2 + (block - first_block) % 2 * 2) * kRows);
    copy_rows<D, kRows, kThreads>(tile, keys, block * kRows);
    copy_rows<D, kRows, kThreads>(tile.from_row(kRows), values, block * kRows);
    commit_copies();
  };
  copy_rows<D, kRows, kThreads>(query_tile, packed_head(task.a.qkv, s, b, h), last_block * kRows);
  copy_rows<D, kRows, kThreads>(dout_tile, narrow_head(task.a.dout, s, b, h), last_block * kRows);
  copy_block(first_block);

  const float scale = static_cast<float>(s.scale), scale_log2 = scale * kLog2E;
  VisibleKeys visible{};
  float lse2[2], delta[2];
  int latest_start = 0;  // the greatest first key of the block's queries
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int t = row + lane_id() / 4 + 8 * half;
    visible.last[half] = t;
    if (kDocuments) visible.first[half] = statistics.first_key[min(t, seq - 1)];
    lse2[half] = t < seq ? statistics.lse[t] * kLog2E : INFINITY;
    delta[half] = t < seq ? statistics.delta[t] : 0.0F;
  }
  if (kDocuments) latest_start = statistics.first_key[min((last_block + 1) * kRows, seq) - 1];

  float dq[D / 8][4] = {};
#pragma unroll 1
  for (int block = first_block; block <= last_block; ++block) {
    if (block < last_block) {
      copy_block(block + 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    const SharedTile<D> key_tile = query_tile.from_row((2 + (block - first_block) % 2 * 2) * kRows);
    const SharedTile<D> value_tile = key_tile.from_row(kRows);
    const bool masked = block == last_block || (kDocuments && block * kRows < latest_start);
#pragma unroll 1
    for (int i = 0; i < kRows; i += 32) {
      const int key = block * kRows + i;
      if (key > row + 15) break;
      float p[4][4] = {}, d[4][4] = {};
#pragma unroll
      for (int k = 0; k < D / 16; ++k) {
        std::uint32_t q[4], dout[4];
        load_a(q, query_tile, warp_row, 2 * k);
        load_a(dout, dout_tile, warp_row, 2 * k);
#pragma unroll
        for (int piece = 0; piece < 2; ++piece) {
          std::uint32_t b_keys[4], b_values[4];
          load_b(b_keys, key_tile, i + 16 * piece, 2 * k);
          mma(p[2 * piece], q, b_keys[0], b_keys[1]);
          mma(p[2 * piece + 1], q, b_keys[2], b_keys[3]);
          load_b(b_values, value_tile, i + 16 * piece, 2 * k);
          mma(d[2 * piece], dout, b_values[0], b_values[1]);
          mma(d[2 * piece + 1], dout, b_values[2], b_values[3]);
        }
      }
      const int column = key + lane_id() % 4 * 2;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float probability = fast_exp2(p[n][e] * scale_log2 - lse2[e / 2]);
          if (masked && !visible(e / 2, column + 8 * n + e % 2)) probability = 0.0F;
          d[n][e] = probability * (d[n][e] - delta[e / 2]);
        }
      }
#pragma unroll
      for (int piece = 0; piece < 2; ++piece) {
        const std::uint32_t ds[4] = {pack_bf16(d[2 * piece][0], d[2 * piece][1]),
                                     pack_bf16(d[2 * piece][2], d[2 * piece][3]),
                                     pack_bf16(d[2 * piece + 1][0], d[2 * piece + 1][1]),
                                     pack_bf16(d[2 * piece + 1][2], d[2 * piece + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
          std::uint32_t b_keys[4];
          load_b_rows(b_keys, key_tile, i + 16 * piece, 2 * n);
          mma(dq[2 * n], ds, b_keys[0], b_keys[1]);
          mma(dq[2 * n + 1], ds, b_keys[2], b_keys[3]);
        }
      }
    }
    __syncthreads();  // before the next copy overwrites this stage
  }
  store_rows<D>(packed_head(task.a.dqkv, s, b, h), row, dq, scale, scale);
}

template <int D, bool kDocuments>
void run(const AttentionBackward<bf16>& a, cudaStream_t stream) {
  const Task task{a, static_cast<int>(blocks_for(a.shape.seq, kRows))};
  const std::int64_t sequences = a.shape.batch * task.blocks;
  launch("attention_backward", key_gradients_kernel<D, kDocuments>,
         {static_cast<unsigned>(sequences * a.shape.kv_heads), kThreads, kSharedBytes<D>}, stream, task);
  launch("attention_backward", query_gradients_kernel<D, kDocuments>,
         {static_cast<unsigned>(sequences * a.shape.heads), kThreads, kSharedBytes<D>}, stream, task);
}

template <int D>
void run(const AttentionBackward<bf16>& a, cudaStream_t stream) {
  if (a.first_key == nullptr) {
    run<D, false>(a, stream);
  } else {
    run<D, true>(a, stream);
  }
}

}  // namespace

void attend_flash_backward(const AttentionBackward<bf16>& a, cudaStream_t stream) {
  attention_delta(a, stream);
  if (a.shape.head_dim <= 64) {
    run<64>(a, stream);
  } else {
    run<128>(a, stream);
  }
}

}  // namespace fathom::cuda
