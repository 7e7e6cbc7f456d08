// Attention of a decoding step over a cache of codes (kernels/cache_codes.h): what decode_attention.cuh does
// over one of bf16, by the walk that attention op by op has too (code_walk.cuh).
//
// The new entry becomes the codes that cache_append.cu would make of the same bf16, and is attended to as the
// cache holds it, so that a text goes on alike whoever does its steps. Sums are over low + step code as fp32
// has it, without the rounding to bf16 of cache_codes.h: whole steps are not for the row-invariant mode.
#pragma once

#include <cstdint>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/cache_codes.cuh"
#include "kernels/cuda/device/code_walk.cuh"
#include "kernels/cuda/device/decode_attention.cuh"

namespace fathom::cuda {

/// Codes wait in the ring of the weights, which has none while attention is computed: kRing times 16 bytes of
/// each thread. Two steps are computed together where two passes of them have room, one where that has; where
/// not even that, codes come into registers.
template <int kDim, int kKv, int kRing>
struct CodeWalkRoom {
  static constexpr int kSteps = kRing / loads_of_step(kDim, kKv);
  static constexpr int kWide = kSteps == 2 || kSteps == 3 ? 1 : 2;
  static constexpr int kPlaces = kSteps < 2 ? 0 : kSteps / kWide < 4 ? kSteps / kWide : 4;
};

template <int kDim, int kKv, int kRing>
using DecodeCodeWalk =
    CodeWalk<kDim, kKv, CodeWalkRoom<kDim, kKv, kRing>::kWide, CodeWalkRoom<kDim, kKv, kRing>::kPlaces>;

/// x -> H x / sqrt(d) of turned heads, where the model has it: Sylvester's matrix (kernels/hadamard.h), by
/// the same sums in the same order, of what is rounded to bf16 before, as hadamard.cu does it.
template <int kDim>
struct HeadHadamard {
  bool is_on;

  __device__ __forceinline__ void operator()(float (&a)[kDim / 64], float (&b)[kDim / 64]) const {
    constexpr int kPairs = kDim / 64;
    constexpr float kScale = kDim == 64 ? 0.125F : 0.08838834764831845F;
    if (!is_on) return;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      a[p] = __bfloat162float(__float2bfloat16_rn(a[p]));
      b[p] = __bfloat162float(__float2bfloat16_rn(b[p]));
    }
#pragma unroll
    for (int half = 1; half < 32; half *= 2) {
      // The lower of two elements gets their sum, the upper one the lower less itself.
      const float sign = (threadIdx.x & static_cast<unsigned>(half)) != 0 ? -1.0F : 1.0F;
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        a[p] = fmaf(sign, a[p], __shfl_xor_sync(kFullWarp, a[p], half));
        b[p] = fmaf(sign, b[p], __shfl_xor_sync(kFullWarp, b[p], half));
      }
    }
    if constexpr (kPairs == 2) {
      swap_sums(a[0], a[1]);
      swap_sums(b[0], b[1]);
    }
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      swap_sums(a[p], b[p]);
      a[p] *= kScale;
      b[p] *= kScale;
    }
  }

 private:
  __device__ __forceinline__ static void swap_sums(float& low, float& high) {
    const float sum = low + high;
    high = low - high;
    low = sum;
  }
};

/// Of a dense layer's piece: the block of the table in which this warp's first step lies. No step: anything.
__device__ __forceinline__ int first_block_of(const DecodeStep& s, const AttentionPiece& p) {
  const int entry = (p.range.first + static_cast<int>(threadIdx.x) / 32) * 16;
  if (entry >= p.range.end * 16) return 0;
  return s.tables[static_cast<std::int64_t>(s.row[p.row].slot) * (1 + s.routed_layers) * s.most_blocks +
                  entry / s.block];
}

/// A piece's first entries begin to come. `first_block`: of this warp (first_block_of), where the piece is a
/// dense layer's first one; negative: to be looked up. `ring`: this thread's first 16 bytes of it.
template <int kDim, int kKv, int kRing>
__device__ __forceinline__ DecodeCodeWalk<kDim, kKv, kRing> begin_code_piece(const DecodeStep& s,
                                                                             const DecodeLayer& layer,
                                                                             const AttentionPiece& p,
                                                                             int first_block, unsigned ring) {
  const bool routed = layer.routed >= 0;
  DecodeCodeWalk<kDim, kKv, kRing> walk(
      WalkedCodes{reinterpret_cast<const std::uint8_t*>(s.pool), s.block, s.kv_heads,
                  table_of(s, layer, p.row), routed ? 1 : s.stride, routed ? 0 : layer.dense, p.head},
      ring);
  walk.begin(p.range, p.entries, first_block);
  return walk;
}

/// What this warp makes codes of: 0: the new entry's key, 1: its value; others: of nothing. The last two
/// warps do, since the first ones may have a step more than these.
__device__ __forceinline__ int part_to_code() {
  return kDecodeWarps - 1 - static_cast<int>(threadIdx.x) / 32;
}

/// What the new entry's key loses before it becomes codes, a lane's elements lane + 32 i: asked for before
/// the key is there, so that nobody waits for it then.
template <int kDim>
struct KeyMean {
  float of[kDim / 32];
  bool is_there;

  __device__ __forceinline__ KeyMean(const DecodeStep& s, const DecodeLayer& layer, const AttentionPiece& p)
      : of{}, is_there(s.key_means != nullptr) {
    if (!is_there || !p.first || part_to_code() != 0) return;
    const int number = layer.routed >= 0 ? s.depth - s.routed_layers + layer.routed : layer.dense;
    const float* const mean = s.key_means + (number * s.kv_heads + p.head) * kDim + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) of[i] = __ldg(mean + 32 * i);
  }
  /// By the warp that makes codes of the key.
  __device__ __forceinline__ void take_off(float* key) const {
    if (!is_there) return;
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) key[lane + 32 * i] = __fsub_rn(key[lane + 32 * i], of[i]);
    __syncwarp();
  }
};

/// The new entry to the block of the pool that gets it, and in shared memory what will be read of it in its
/// place.
template <int kDim, int kKv>
__device__ __forceinline__ void append_codes(const DecodeStep& s, const AttentionPiece& p,
                                             std::int64_t entry_block, const KeyMean<kDim>& mean,
                                             AttentionRoom<kDim>& room) {
  constexpr int kBytes = kDim * kKv / 8;
  const int part = part_to_code();
  if (part > 1) return;
  const std::int64_t bytes = 2 * s.kv_heads * s.block * (kBytes + kCacheScaleBytes);
  const CodeBlock<kKv> block{reinterpret_cast<std::uint8_t*>(s.pool) + entry_block * bytes, s.block,
                             s.kv_heads, kBytes};
  float* const x = part == 0 ? room.key : room.value;
  const int head = part * s.kv_heads + p.head, inside = p.entries % s.block;
  if (part == 0) mean.take_off(x);
  encode_head<kKv>(block.codes(head, inside), block.scales(head, inside), HeadToCode<float>{x}, kDim,
                   [&](int e, unsigned code, const CodeScale& scale) { x[e] = scale.number(code); });
}

/// A warp's part of attention over a piece, on the way since begin_code_piece; the first piece of a head also
/// puts the new entry into the cache. All threads call it, when the projection has been seen.
template <int kDim, int kKv, typename Walk>
__device__ __forceinline__ void attend_codes(const DecodeStep& s, const DecodeLayer& layer,
                                             const AttentionPiece& p, const float2* rotation,
                                             std::int64_t entry_block, Walk& walk,
                                             AttentionRoom<kDim>& room) {
  const int group = s.heads / s.kv_heads;
  const KeyMean<kDim> mean(s, layer, p);
  sync_workers();  // the last piece's results have been read
  turn_heads<kDim>(s, layer, s.qkv + static_cast<std::int64_t>(p.row) * (s.heads + 2 * s.kv_heads) * kDim,
                   rotation, p.head, group, room, HeadHadamard<kDim>{s.transforms_heads != 0});
  sync_workers();
  if (p.first) append_codes<kDim, kKv>(s, p, entry_block, mean, room);
  walk.run(room.queries, group);
}

/// What the warps have found, into `parts`. All threads call it.
template <int kDim, int kKv, typename Walk>
__device__ __forceinline__ void leave_code_piece(const DecodeStep& s, const AttentionPiece& p, Walk& walk,
                                                 AttentionRoom<kDim>& room) {
  const int group = s.heads / s.kv_heads;
  walk.leave(room, static_cast<int>(threadIdx.x) / 32, group);
  if (p.first) {
    sync_workers();  // the new entry is there as it will be read
    score_new_entry<kDim>(group, room);
  }
  sync_workers();
  join_warps<kDim>(s, p, group, room);
}

}  // namespace fathom::cuda
