// Flash attention's backward for sequences of at most 256 tokens and heads of at most 64, which a routed
// block's kept tokens are: a block holds a whole head in shared memory, so that everything is read once, and
// starts on the first rows while the later ones are on their way.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/device/attention_heads.cuh"
#include "kernels/cuda/device/flash_backward.cuh"
#include "kernels/cuda/device/launch.cuh"

namespace fathom::cuda {

namespace {

constexpr int kWidth = 64;
constexpr int kBlockRows = 64;
constexpr int kBlocks = 4;
constexpr int kRows = kBlocks * kBlockRows;
using Tile = SharedTile<kWidth>;

/// Waits until the copies of block `block` have landed; the group of a block is committed in order.
__device__ __forceinline__ void wait_block(int block) {
  if (block == 0) {
    wait_copies<kBlocks - 1>();
  } else if (block == 1) {
    wait_copies<kBlocks - 2>();
  } else if (block == 2) {
    wait_copies<kBlocks - 3>();
  } else {
    wait_copies<0>();
  }
}

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kWarpKeys = kRows / kWarps;

/// k, v, q and dout of the head, dS^T of two blocks of queries, and two floats a query.
constexpr std::size_t kSharedBytes =
    (4 * kRows * kWidth + 2 * kRows * kBlockRows) * sizeof(bf16) + 2 * kRows * sizeof(float);

/// A chunk of out: which one is the same as of the dout that copy_rows has this thread copy.
struct OutChunks {
  static constexpr int kCount = kBlockRows * Tile::kChunks / kThreads;
  uint4 chunk[kCount];

  __device__ __forceinline__ static int row(int i) {
    return (static_cast<int>(threadIdx.x) + i * kThreads) / Tile::kChunks;
  }
  __device__ __forceinline__ static int column(int) { return static_cast<int>(threadIdx.x) % Tile::kChunks; }

  __device__ __forceinline__ void load(const HeadRows& out, int first_row) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int r = first_row + row(i);
      chunk[i] = make_uint4(0, 0, 0, 0);
      if (r < out.rows && column(i) * 8 < out.head_dim) {
        chunk[i] = *reinterpret_cast<const uint4*>(out.data + r * out.stride + column(i) * 8);
      }
    }
  }

  /// delta of the block's rows, from this thread's own copies of dout: no barrier is needed before.
  __device__ __forceinline__ void delta(float* to, Tile dout) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint4 other = *reinterpret_cast<const uint4*>(dout.chunk(row(i), column(i)));
      float sum = dot(chunk[i].x, other.x) + dot(chunk[i].y, other.y) + dot(chunk[i].z, other.z) +
                  dot(chunk[i].w, other.w);
#pragma unroll
      for (int offset = Tile::kChunks / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(kFullWarp, sum, offset);
      }
      if (column(i) == 0) to[row(i)] = sum;
    }
  }

 private:
  __device__ __forceinline__ static float dot(std::uint32_t a, std::uint32_t b) {
    const float2 x = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&a));
    const float2 y = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&b));
    return x.x * y.x + x.y * y.y;
  }
};

/// dq of the 64 queries from `query` on, from their dS^T [keys, 64]: a warp has 16 rows and half of the
/// columns.
__device__ __forceinline__ void query_gradients(const HeadOutput& dq, SharedTile<kBlockRows> ds, Tile keys,
                                                int query, float scale) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int rows = warp % 4, half = warp / 4;
  float sum[4][4] = {};
#pragma unroll 2
  for (int key = 0; key <= query + 16 * rows; key += 16) {
    std::uint32_t a[4];
    load_a_transposed(a, ds, key, 2 * rows);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      std::uint32_t b[4];
      load_b_rows(b, keys, key, 4 * half + 2 * n);
      mma(sum[2 * n], a, b[0], b[1]);
      mma(sum[2 * n + 1], a, b[2], b[3]);
    }
  }
  const HeadOutput to{dq.data + 32 * half, dq.stride, dq.rows, dq.head_dim - 32 * half};
  store_rows<32>(to, query + 16 * rows, sum, scale, scale);
}

/// A warp owns 32 keys and their dk and dv; blocks of 64 queries come in turn. Their dS go through shared
/// memory to dq, one block behind, so that one barrier a block suffices.
/// Traffic: q, k, v, out, dout and dqkv once, lse.
__global__ void __launch_bounds__(kThreads, 1) short_backward_kernel(const AttentionBackward<bf16> a) {
  extern __shared__ __align__(128) unsigned char shared_memory[];
  const Tile key_tile{reinterpret_cast<bf16*>(shared_memory)};
  const Tile value_tile = key_tile.from_row(kRows);
  const Tile query_tile = key_tile.from_row(2 * kRows), dout_tile = key_tile.from_row(3 * kRows);
  const SharedTile<kBlockRows> ds_tiles{key_tile.from_row(4 * kRows).data};
  auto* const lse2 = reinterpret_cast<float*>(ds_tiles.from_row(2 * kRows).data);
  float* const delta = lse2 + kRows;

  const AttentionShape& s = a.shape;
  const int seq = static_cast<int>(s.seq), heads = static_cast<int>(s.heads);
  const int kv_heads = static_cast<int>(s.kv_heads), group = heads / kv_heads;
  const int b = static_cast<int>(blockIdx.x) / kv_heads, kv = static_cast<int>(blockIdx.x) % kv_heads;
  const int warp_key = static_cast<int>(threadIdx.x) / 32 * kWarpKeys;
  const float scale = static_cast<float>(s.scale);
  const int blocks = (seq + kBlockRows - 1) / kBlockRows;

  KeyGradients<kWidth, kWarpKeys / 16> gradients;
  gradients.clear();
#pragma unroll 1
  for (int h = kv * group; h < (kv + 1) * group; ++h) {
    const HeadRows queries = packed_head(a.qkv, s, b, h), douts = narrow_head(a.dout, s, b, h);
    const HeadRows outs = narrow_head(a.out, s, b, h);
    const HeadOutput dq = packed_head(a.dqkv, s, b, h);
    __syncthreads();  // the previous head is done with the tiles
#pragma unroll 1
    for (int block = 0; block < kBlocks; ++block) {
      const int row = block * kBlockRows;
      if (row < seq) {
        if (h == kv * group) {
          copy_rows<kWidth, kBlockRows, kThreads>(key_tile.from_row(row),
                                                  packed_head(a.qkv, s, b, heads + kv), row);
          copy_rows<kWidth, kBlockRows, kThreads>(value_tile.from_row(row),
                                                  packed_head(a.qkv, s, b, heads + kv_heads + kv), row);
        }
        copy_rows<kWidth, kBlockRows, kThreads>(query_tile.from_row(row), queries, row);
        copy_rows<kWidth, kBlockRows, kThreads>(dout_tile.from_row(row), douts, row);
      }
      commit_copies();
    }
    OutChunks out_chunks;
    out_chunks.load(outs, 0);
    const float* lse = a.lse + (static_cast<std::int64_t>(b) * heads + h) * seq;
    for (int t = static_cast<int>(threadIdx.x); t < kRows; t += kThreads) {
      lse2[t] = t < seq ? lse[t] * kLog2E : INFINITY;
    }
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      const int block_query = block * kBlockRows;
      wait_block(block);
      out_chunks.delta(delta + block_query, dout_tile.from_row(block_query));
      out_chunks.load(outs, block_query + kBlockRows);
      __syncthreads();
      const SharedTile<kBlockRows> ds_tile = ds_tiles.from_row(block % 2 * kRows);
#pragma unroll 1
      for (int step = 0; step < kBlockRows; step += 16) {
        const int query = block_query + step;
        if (query + 15 < warp_key) continue;
        std::uint32_t ds[kWarpKeys / 16][4];
        gradients.add(key_tile.from_row(warp_key), value_tile.from_row(warp_key), warp_key,
                      query_tile.from_row(query), dout_tile.from_row(query), query,
                      {lse2 + query, delta + query, nullptr}, scale * kLog2E, ds);
        const int g = lane_id() / 4, c2 = lane_id() % 4 * 2;
#pragma unroll
        for (int m = 0; m < kWarpKeys / 16; ++m) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            bf16* const to = ds_tile.chunk(warp_key + 16 * m + g + i % 2 * 8, step / 8 + i / 2) + c2;
            *reinterpret_cast<std::uint32_t*>(to) = ds[m][i];
          }
        }
      }
      if (block > 0) {
        query_gradients(dq, ds_tiles.from_row((block - 1) % 2 * kRows), key_tile, block_query - kBlockRows,
                        scale);
      }
    }
    __syncthreads();
    query_gradients(dq, ds_tiles.from_row((blocks - 1) % 2 * kRows), key_tile, (blocks - 1) * kBlockRows,
                    scale);
  }
  gradients.store(packed_head(a.dqkv, s, b, heads + kv), packed_head(a.dqkv, s, b, heads + kv_heads + kv),
                  warp_key, scale);
}

}  // namespace

bool short_flash_supports(const AttentionShape& s) {
  return flash_supports(s) && s.seq <= kRows && s.head_dim <= kWidth &&
         static_cast<std::int64_t>(kSharedBytes) <= most_shared_bytes();
}

void attend_short_flash_backward(const AttentionBackward<bf16>& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(a.shape.seq == 0 ? 0 : a.shape.batch * a.shape.kv_heads);
  launch("attention_backward", short_backward_kernel, {blocks, kThreads, kSharedBytes}, stream, a);
}

}  // namespace fathom::cuda
