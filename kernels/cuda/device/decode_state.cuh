// What the phases of a decoding step share (decode_whole.cuh): the layout of shared memory, the order of the
// products, and what a thread keeps from one phase to the next.
//
// Shared memory holds, one behind the other: DecodeFixed; the layers' pointers, with codes also those of
// their scales; cosines and sines of the rows; scales of groups, for two matrices; the ring through which the
// weights come (decode_product.cuh, decode_ring.cuh, decode_codes.cuh), and between them the codes that
// attention is over (decode_code_attention.cuh); and a room that each phase uses as it likes. For a product
// those are the staged rows and behind them the warps' sums, for attention an AttentionRoom.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/decode_codes.cuh"
#include "kernels/cuda/device/decode_deal.cuh"
#include "kernels/cuda/device/decode_grid.cuh"
#include "kernels/cuda/device/decode_order.cuh"
#include "kernels/cuda/device/decode_product.cuh"
#include "kernels/cuda/device/decode_ring.cuh"

namespace fathom::cuda {

/// What stays in shared memory for the whole step.
struct DecodeFixed {
  RingMeeting meeting;  // where weights are brought by warps of their own
  Matrix matrices[kDecodeProducts];
  float squares[kDecodeRows][kDecodeWarps];  // the warps' sums: of squares, or of the router's score
  float logits[kDecodeRows][kDecodeWarps];   // of predictors, likewise
  float scales[kDecodeRows];                 // 1 / rms of the staged rows
  float gates[kDecodeRows];
  int tokens[kDecodeRows];
  unsigned long long kept_before[kDecodeRows];  // by the row that this one follows, a bit a routed layer
  bool is_computed[kDecodeRows];
  AttentionDeal
      deals[2];  // of a dense layer's rows, the same in all of them; of those that a routed one computes
  AttentionPiece first[2];                // of the same two: this block's first piece, where it has one
  std::int64_t first_keys[kDecodeWarps];  // of a dense layer's first piece: where this warp's first step
                                          // begins in the pool, less the layer; of codes, its block
  double before[kDecodeRows];   // of a draw: where in this block's sum the share falls; negative: elsewhere
  float greatest[kDecodeRows];  // logit
  float scratch[kDecodeWarps];
};

/// Up to the next multiple of 128: where something in shared memory may begin.
__host__ __device__ constexpr std::size_t rounded_shared(std::size_t bytes) {
  return (bytes + 127) / 128 * 128;
}

/// Tiles of a matrix that a block of threads has at the most (Matrix::deal).
__host__ __device__ inline int most_tiles(int out, bool halves, int blocks) {
  const int tiles = halves ? (out / 2 + 3) / 4 : (out + 7) / 8;
  return (tiles + blocks - 1) / blocks;
}

/// Bytes of one matrix's scales of groups, at the most.
__host__ __device__ inline int group_scale_bytes(const DecodeStep& s, int head_dim, int blocks) {
  if (s.group == 0) return 0;
  const auto bytes = [&](int out, int in, bool halves) {
    return GroupScales::bytes(in, most_tiles(out, halves, blocks));
  };
  const int attention = max(bytes((s.heads + 2 * s.kv_heads) * head_dim, s.width, false),
                            bytes(s.width, s.heads * head_dim, false));
  return max(attention, max(bytes(2 * s.hidden, s.width, true), bytes(s.width, s.hidden, false)));
}

/// Where what begins in shared memory behind DecodeFixed, in bytes.
struct DecodeLayout {
  int group_bytes;  // of one matrix's scales of groups
  std::size_t layers, scales, rotation, groups, ring, room;
  /// `bits`: those of `s`, which a kernel knows before it is launched.
  __host__ __device__ DecodeLayout(const DecodeStep& s, int bits, int rows, int head_dim, int blocks,
                                   int ring_bytes) {
    const auto depth = static_cast<std::size_t>(s.depth);
    group_bytes = bits == 16 ? 0 : group_scale_bytes(s, head_dim, blocks);
    layers = rounded_shared(sizeof(DecodeFixed));
    scales = layers + rounded_shared(sizeof(DecodeLayer) * depth);
    rotation = scales + rounded_shared(bits == 16 ? 0 : sizeof(DecodeScales) * depth);
    groups = rotation + rounded_shared(sizeof(float2) * static_cast<std::size_t>(rows * head_dim / 2));
    ring = groups + rounded_shared(static_cast<std::size_t>(2 * group_bytes));
    room = ring + rounded_shared(static_cast<std::size_t>(ring_bytes));
  }
};

/// One for each thread: the launch's arguments, shared memory, and what passes from phase to phase.
struct DecodeState {
  const DecodeStep& s;
  Grid grid;
  DecodeFixed& fixed;
  DecodeLayout layout;
  DecodeLayer* layers;
  DecodeScales* scales;  // of the layers' codes, where they have any
  float2* rotation;      // cosines and sines, [rows][d/2]
  unsigned char* room;   // of the phase
  int thread, warp, lane;
  bool met = false;     // all blocks of threads, once: what one wrote another may read
  bool joined = false;  // attention is in `mixed`, not in pieces
  // Of a product this thread's first result, as much of it as is known ahead: its row and its place among all
  // rows' results, or -1; the first of its parts among all; and what it is added to, or multiplied by.
  int first_row = 0, first_at = -1, first_part = 0;
  float stream_before = 0, branch_before = 0, predictor_weight = 0;
  float row_scale = 0, other_row_scale = 0;

  __device__ DecodeState(const DecodeStep& step, int bits, unsigned char* shared, int head_dim,
                         int ring_bytes)
      : s(step),
        grid(step.arrivals, step.turn),
        fixed(*reinterpret_cast<DecodeFixed*>(shared)),
        layout(step, bits, step.rows, head_dim, static_cast<int>(gridDim.x), ring_bytes),
        layers(reinterpret_cast<DecodeLayer*>(shared + layout.layers)),
        scales(reinterpret_cast<DecodeScales*>(shared + layout.scales)),
        rotation(reinterpret_cast<float2*>(shared + layout.rotation)),
        room(shared + layout.room),
        thread(static_cast<int>(threadIdx.x)),
        warp(thread / 32),
        lane(thread % 32) {}

  __device__ __forceinline__ void meet() {
    grid.wait();
    met = true;
  }
  __device__ __forceinline__ Matrix& matrix(DecodeProduct p) const {
    return fixed.matrices[static_cast<int>(p)];
  }
  /// Of a layer's product by codes.
  __device__ __forceinline__ const float* scales_of(const DecodePlace& p) const {
    return scales[p.layer].of[static_cast<int>(p.product) - static_cast<int>(DecodeProduct::Project)];
  }
  /// Of the head, which has none, the last one.
  __device__ __forceinline__ const DecodeLayer& layer_at(const DecodePlace& p) const {
    return layers[min(p.layer, s.depth - 1)];
  }
  __device__ __forceinline__ AttentionDeal& deal(const DecodeLayer& l) const {
    return fixed.deals[l.routed >= 0 ? 1 : 0];
  }
  /// The entries of a layer, with the deal's rows there: by one thread. `routed`: its number, or -1 for all
  /// dense ones.
  __device__ __forceinline__ void deal_entries(int routed) const {
    const int which = routed >= 0 ? 1 : 0, block = static_cast<int>(blockIdx.x);
    AttentionDeal& d = fixed.deals[which];
    d.deal(s, fixed.kept_before, routed);
    if (block >= d.blocks) return;
    fixed.first[which] =
        d.even ? d.piece_at(s, d.first_step(block), d.first_step(block + 1)) : d.piece_at(s, block, d.blocks);
  }
  /// A predictor's hidden layer, [rows][P]. Two in turn: a block of threads may be a decision ahead of
  /// another.
  __device__ __forceinline__ float* predicted(const DecodeLayer& l) const {
    return s.predicted + static_cast<std::int64_t>(l.routed % 2) * kDecodeRows * s.predictor_hidden;
  }
};

/// A phase, which works on what all share. It lives for one call, so that the state stays in registers: an
/// object that a thread keeps beside the state, and that points to it, would move it to memory.
class DecodePhase {
 public:
  __device__ __forceinline__ explicit DecodePhase(DecodeState& state)
      : state_(state),
        s_(state.s),
        fixed_(state.fixed),
        thread_(state.thread),
        warp_(state.warp),
        lane_(state.lane) {}

 protected:
  /// `first` and all warps' sums of a row, in this order.
  static __device__ __forceinline__ float sum_of_warps(const float (&sums)[kDecodeWarps], float first = 0) {
    float sum = first;
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) sum += sums[w];
    return sum;
  }
  /// Of a staged row, from the sums of its squares.
  __device__ __forceinline__ float reciprocal_rms(int row) const {
    return rsqrtf(sum_of_warps(fixed_.squares[row]) / static_cast<float>(s_.width) + s_.norm_eps);
  }

  DecodeState& state_;
  const DecodeStep& s_;
  DecodeFixed& fixed_;
  int thread_, warp_, lane_;
};

}  // namespace fathom::cuda
