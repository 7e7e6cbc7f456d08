// Attention of one new entry over a row's earlier ones in the cache, for the query heads of one key/value
// head and a piece of the entries: a block of threads, whose warps take steps of 16 entries in turn.
//
// A piece leaves its values, divided by its sum of exponentials, and beside them the greatest score and that
// sum: enough to join the pieces of a head.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/decode_deal.cuh"
#include "kernels/cuda/device/decode_grid.cuh"
#include "kernels/cuda/device/entry_walk.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/rotation.cuh"

namespace fathom::cuda {

/// Nothing more is done to a turned head.
struct NoTransform {
  template <int kPairs>
  __device__ __forceinline__ void operator()(float (&)[kPairs], float (&)[kPairs]) const {}
};

/// The new entry's key and value and the queries of its group, into shared memory: QK-norm and RoPE for the
/// key and the queries, and the queries times the scores' scale. The block synchronises afterwards. `packed`:
/// the row's projection; `rotation`: the row's. `transform(a, b)`: what comes behind RoPE, of a whole warp's
/// elements lane + 32 p, in a, and d/2 further on, in b.
template <int kDim, typename Transform = NoTransform>
__device__ __forceinline__ void turn_heads(const DecodeStep& s, const DecodeLayer& layer, const float* packed,
                                           const float2* rotation, int head, int group,
                                           AttentionRoom<kDim>& room, Transform transform = {}) {
  constexpr int kPairs = kDim / 64;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int i = static_cast<int>(threadIdx.x) / 32; i <= group + 1; i += kDecodeWarps) {
    if (i == group + 1) {
      const float* const from = packed + (s.heads + s.kv_heads + head) * kDim;
#pragma unroll
      for (int e = lane; e < kDim; e += 32)
        room.value[e] = __bfloat162float(__float2bfloat16_rn(__ldcg(from + e)));
      break;
    }
    const bool is_key = i == group;
    const float* const from = packed + (is_key ? s.heads + head : head * group + i) * kDim;
    const float* const weight = is_key ? layer.k_norm : layer.q_norm;
    float a[kPairs], b[kPairs], squares = 0;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      a[p] = __ldcg(from + lane + 32 * p);
      b[p] = __ldcg(from + lane + 32 * p + kDim / 2);
      squares += a[p] * a[p] + b[p] * b[p];
    }
    const float scale =
        weight != nullptr ? rsqrtf(warp_reduce(squares, Sum{}) / static_cast<float>(kDim) + s.qk_eps) : 1.0F;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const int e = lane + 32 * p;
      if (weight != nullptr) {
        a[p] *= scale * weight[e];
        b[p] *= scale * weight[e + kDim / 2];
      }
      rotate(a[p], b[p], rotation[e].x, rotation[e].y);
    }
    transform(a, b);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      const int e = lane + 32 * p;
      if (is_key) {
        room.key[e] = __bfloat162float(__float2bfloat16_rn(a[p]));
        room.key[e + kDim / 2] = __bfloat162float(__float2bfloat16_rn(b[p]));
      } else {
        __nv_bfloat16* const to = room.queries + i * AttentionRoom<kDim>::kStride;
        to[e] = __float2bfloat16_rn(a[p] * s.score_scale);
        to[e + kDim / 2] = __float2bfloat16_rn(b[p] * s.score_scale);
      }
    }
  }
}

/// The table of a row's blocks in a layer.
__device__ __forceinline__ const std::int32_t* table_of(const DecodeStep& s, const DecodeLayer& layer,
                                                        int row) {
  return s.tables + (static_cast<std::int64_t>(s.row[row].slot) * (1 + s.routed_layers) + 1 + layer.routed) *
                        s.most_blocks;
}
/// Of a dense layer's piece: where this warp's first step begins in the pool, in elements, if it were the
/// first layer's; every layer is as many elements further on as a block of one layer has. No step: anything.
template <int kDim>
__device__ __forceinline__ std::int64_t first_keys_of(const DecodeStep& s, const AttentionPiece& p) {
  const int entry = (p.range.first + static_cast<int>(threadIdx.x) / 32) * 16;
  if (entry >= p.range.end * 16) return 0;
  const std::int64_t block =
      s.tables[static_cast<std::int64_t>(s.row[p.row].slot) * (1 + s.routed_layers) * s.most_blocks +
               entry / s.block];
  return ((block * s.stride * 2 * s.kv_heads + p.head) * s.block + entry % s.block) * kDim;
}

/// A piece's first entries begin to come: those of earlier steps wait for nothing of this one. `first_keys`:
/// of this warp (first_keys_of), where the piece is a dense layer's first one; negative: to be looked up.
template <int kDim>
__device__ __forceinline__ EntryWalk<kDim, DecodeStep> begin_piece(const DecodeStep& s,
                                                                   const DecodeLayer& layer,
                                                                   const AttentionPiece& p,
                                                                   std::int64_t first_keys) {
  const bool routed = layer.routed >= 0;
  EntryWalk<kDim, DecodeStep> walk(s, table_of(s, layer, p.row), routed ? 1 : s.stride,
                                   routed ? 0 : layer.dense, p.head);
  if (first_keys >= 0) {
    const std::int64_t layer_size = static_cast<std::int64_t>(2) * s.kv_heads * s.block * kDim;
    walk.begin_at(s.pool + first_keys + layer.dense * layer_size, p.range, p.entries);
  } else {
    walk.begin(p.range, p.entries);
  }
  return walk;
}

/// The block of the pool that gets the new entry of a piece's row, if the piece is the first one. Read before
/// the next weights are asked for, when the blocks of threads have met: the tables are up to date then.
__device__ __forceinline__ std::int64_t new_entry_block(const DecodeStep& s, const DecodeLayer& layer,
                                                        const AttentionPiece& p) {
  if (!p.first) return 0;
  const std::int64_t block = __ldcg(table_of(s, layer, p.row) + p.entries / s.block);
  return layer.routed >= 0 ? block : block * s.stride + layer.dense;
}

/// A warp's part of attention over a piece, on the way since begin_piece. All threads call it, when the
/// projection has been seen.
template <int kDim>
__device__ __forceinline__ void attend_entries(const DecodeStep& s, const DecodeLayer& layer,
                                               const AttentionPiece& p, const float2* rotation,
                                               EntryWalk<kDim, DecodeStep>& walk, AttentionRoom<kDim>& room) {
  const int group = s.heads / s.kv_heads;
  sync_workers();  // the last piece's results have been read
  turn_heads<kDim>(s, layer, s.qkv + static_cast<std::int64_t>(p.row) * (s.heads + 2 * s.kv_heads) * kDim,
                   rotation, p.head, group, room);
  sync_workers();
  walk.run(room.queries, group, p.range, p.entries);
}

/// What the warps have left of a piece, and the new entry if the piece is the first one, into `parts`.
template <int kDim>
__device__ __forceinline__ void join_warps(const DecodeStep& s, const AttentionPiece& p, int group,
                                           const AttentionRoom<kDim>& room) {
  for (int i = static_cast<int>(threadIdx.x); i < group * kDim; i += kDecodeThreads) {
    const int h = i / kDim, e = i % kDim;
    float most = p.first ? room.scores[h] : -INFINITY;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) most = fmaxf(most, room.max[w][h]);
    float sum = 0, value = 0;
    if (p.first) {
      sum = fast_exp2(room.scores[h] - most);
      value = sum * room.value[e];
    }
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      if (room.max[w][h] == -INFINITY) continue;  // no step, or no entry in it: no values
      const float weight = fast_exp2(room.max[w][h] - most);
      sum = fmaf(weight, room.sum[w][h], sum);
      value = fmaf(weight, room.values_of(w, h)[e], value);
    }
    const std::int64_t at = static_cast<std::int64_t>(p.row) * s.heads + p.head * group + h;
    s.parts[(at * kDecodeSplits + p.piece) * kDim + e] = __float2bfloat16_rn(sum > 0 ? value / sum : 0.0F);
    if (e == 0) s.part_weights[at * kDecodeSplits + p.piece] = float2{most, sum};
  }
}

/// The scores of the new entry.
template <int kDim>
__device__ __forceinline__ void score_new_entry(int group, AttentionRoom<kDim>& room) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int h = static_cast<int>(threadIdx.x) / 32; h < group; h += kDecodeWarps) {
    float score = 0;
    for (int e = lane; e < kDim; e += 32)
      score = fmaf(__bfloat162float(room.queries[h * AttentionRoom<kDim>::kStride + e]), room.key[e], score);
    score = warp_reduce(score, Sum{});
    if (lane == 0) room.scores[h] = score;
  }
}

/// What the warps have found, into `parts`. The first piece of a head also has the new entry, and puts it
/// into the cache. All threads call it.
template <int kDim>
__device__ __forceinline__ void leave_piece(const DecodeStep& s, const AttentionPiece& p,
                                            EntryWalk<kDim, DecodeStep>& walk, std::int64_t entry_block,
                                            AttentionRoom<kDim>& room) {
  const int group = s.heads / s.kv_heads;
  walk.leave(room, static_cast<int>(threadIdx.x) / 32, group);
  if (p.first) {
    score_new_entry<kDim>(group, room);
    __nv_bfloat16* const to =
        s.pool + ((entry_block * 2 * s.kv_heads + p.head) * s.block + p.entries % s.block) * kDim;
    for (int e = static_cast<int>(threadIdx.x); e < kDim; e += kDecodeThreads) {
      to[e] = __float2bfloat16_rn(room.key[e]);
      to[static_cast<std::int64_t>(s.kv_heads) * s.block * kDim + e] = __float2bfloat16_rn(room.value[e]);
    }
  }
  sync_workers();
  join_warps<kDim>(s, p, group, room);
}

/// Elements of a head that a thread joins: a head is sixteen threads' work.
template <int kDim>
inline constexpr int kJoinPack = kDim / 16;

/// So many of them, as words of a pair each.
template <int kDim>
struct alignas(2 * kJoinPack<kDim>) JoinedPack {
  std::uint32_t word[kJoinPack<kDim> / 2];
};

/// A pack of attention from element e, of a head, counted over all rows, from its pieces: some at a time, all
/// of these asked for at once.
template <int kDim>
__device__ __forceinline__ JoinedPack<kDim> join_pieces(const DecodeStep& s, std::int64_t head, int e,
                                                        int pieces) {
  constexpr int kPack = kJoinPack<kDim>;
  using Words = std::conditional_t<kPack == 4, uint2, uint4>;
  constexpr int kAtOnce = kDim == 64 ? 12 : 8;  // what the registers hold
  const float2* const weights = s.part_weights + head * kDecodeSplits;
  const __nv_bfloat16* const parts = s.parts + head * kDecodeSplits * kDim + e;
  float most = -INFINITY, sum = 0;
  float value[kPack] = {};
#pragma unroll 1
  for (int first = 0; first < pieces; first += kAtOnce) {
    float2 w[kAtOnce];
    Words part[kAtOnce];
    float next = most;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool there = first + i < pieces;
      w[i] = there ? __ldcg(weights + first + i) : float2{-INFINITY, 0.0F};
      part[i] = there ? __ldcg(reinterpret_cast<const Words*>(parts + (first + i) * kDim)) : Words{};
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) next = fmaxf(next, w[i].x);
    const float shrink = fast_exp2(most - next);  // the first piece has the new entry: next is finite
    sum *= shrink;
#pragma unroll
    for (int j = 0; j < kPack; ++j) value[j] *= shrink;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float grow = fast_exp2(w[i].x - next) * w[i].y;
      std::uint32_t words[4] = {part[i].x, part[i].y};
      if constexpr (kPack == 8) words[2] = part[i].z, words[3] = part[i].w;
      sum += grow;
#pragma unroll
      for (int j = 0; j < kPack / 2; ++j) {
        value[2 * j] = fmaf(grow, low_of(words[j]), value[2 * j]);
        value[2 * j + 1] = fmaf(grow, high_of(words[j]), value[2 * j + 1]);
      }
    }
    most = next;
  }
  const float scale = 1.0F / sum;
  JoinedPack<kDim> joined;
#pragma unroll
  for (int j = 0; j < kPack / 2; ++j)
    joined.word[j] = pack_bf16(value[2 * j] * scale, value[2 * j + 1] * scale);
  return joined;
}

}  // namespace fathom::cuda
