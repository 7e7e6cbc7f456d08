// One step of decoding (kernels/decoder.h) as one launch: as many blocks of threads as the device has
// multiprocessors stay for the whole step, and meet between its phases (decode_grid.cuh).
//
//   of each layer   decide      routed layers: the predictor's hidden layer, then who is computed
//                   project     norm, W_qkv
//                   attend      QK-norm, RoPE, append, attention over pieces of the entries
//                   (join)      the pieces' results, where they are many; else each block of threads joins
//                               them for itself
//                   mix         W_o, added to the stream
//                   expand      norm, W_gate and W_up, SwiGLU
//                   contract    W_down, gate, the residual stream
//   at the end      head        norm, logits, the best of them; a draw, where one is asked for
//
// All of these but attention are products by a matrix, and a step takes as long as its matrices take to be
// read. So the reading of the next one begins before its rows are there: behind the last product, while the
// blocks wait for each other. Which one is next is not known before a decision, but guessed. Where weights
// and caches are numbers, and rows are few, warps of their own bring them, through all meetings
// (decode_feed.cuh). The matrices of layers may be codes of 4 bits, most of which the ring then holds as a
// whole: the next one's begin to come even before the last product.
//
// A layer that nobody goes through costs its decision, and what was read of it where the guess was wrong:
// every block of threads finds the same answer for itself. Norms are applied behind the products: W (x w /
// rms) = (W (x w)) / rms.
//
// What the phases do stands in device/: decode_decide.cuh, decode_stage.cuh (rows into shared memory),
// decode_results.cuh (products), decode_attention.cuh and decode_code_attention.cuh, decode_choice.cuh; what
// they share in decode_state.cuh.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/decode_attention.cuh"
#include "kernels/cuda/device/decode_choice.cuh"
#include "kernels/cuda/device/decode_code_attention.cuh"
#include "kernels/cuda/device/decode_codes.cuh"
#include "kernels/cuda/device/decode_decide.cuh"
#include "kernels/cuda/device/decode_fed_product.cuh"
#include "kernels/cuda/device/decode_feed.cuh"
#include "kernels/cuda/device/decode_results.cuh"
#include "kernels/cuda/device/decode_stage.cuh"
#include "kernels/cuda/device/decode_state.cuh"
#include "kernels/cuda/device/rotation.cuh"
#include "kernels/error.h"

namespace fathom::cuda {

/// The whole step, as one thread goes through it. kHalves: 1 for up to eight rows, 2 for up to sixteen;
/// kRing: loads of weights ahead; kDim: of a head; kBits: of the weights of a layer's products; kKv: of keys
/// and values in the cache.
template <int kHalves, int kRing, int kDim, int kBits, int kKv>
class DecodeWhole {
 public:
  __device__ DecodeWhole(const DecodeStep& s, unsigned char* shared)
      : state_(s, kBits, shared, kDim, ring_bytes(s)),
        stream_(make_stream(shared + state_.layout.ring)),
        codes_(shared + state_.layout.ring, s.group, shared + state_.layout.groups,
               state_.layout.group_bytes) {}

  static constexpr bool kFed = kHalves == 1 && kBits == 16 && kKv == 16;

  static __device__ __forceinline__ int ring_bytes(const DecodeStep& s) {
    return (kFed ? s.ring : kRing) * kRingLoad;
  }
  /// What a warp does that brings weights.
  static __device__ void feed(const DecodeStep& s, unsigned char* shared) {
    DecodeState state(s, kBits, shared, kDim, ring_bytes(s));
    __syncthreads();
    WeightFeeder(DecodeOrder{s, state.layers}, state.fixed.matrices, state.fixed.meeting,
                 shared + state.layout.ring)
        .run();
  }
  __device__ __forceinline__ void run() {
    prepare();
    DecodePlace now = order().first_of(0);
    bool opened = false;
    for (;;) {
      if (has_product(now) && !opened) open(now);
      Stage(state_).stage(now);
      bool followed = multiply(now);
      if (now.product == DecodeProduct::Head) break;
      DecodePlace next = order().expected_after(now);
      opened = has_product(now);
      if (now.product == DecodeProduct::Project) {
        attend(state_.layers[now.layer], next);
      } else if (opened) {
        followed = followed || (now.product == DecodeProduct::Mix && follows_);
        if (has_product(next) && !followed) open(next);
        state_.meet();
      }
      if (now.product == DecodeProduct::Decide) {
        const DecodePlace decided = decide(now.layer, next);
        opened = opened && decided == next;
        next = decided;
      }
      now = next;
    }
    DecodeChoice(state_).choose();
  }

 private:
  static constexpr bool kCodes = kBits < 16;  // of the layers' products
  /// In place of a stream that there is none of.
  struct NoCodes {
    template <typename... Any>
    __device__ explicit NoCodes(Any... /*any*/) {}
  };
  using Stage = DecodeStage<kHalves, kDim, kBits, kFed>;
  using Results = DecodeResults<kHalves, kDim, kBits, kFed>;

  using Stream = std::conditional_t<kFed, FedStream, WeightStream<kRing>>;
  __device__ __forceinline__ Stream make_stream(unsigned char* ring) {
    if constexpr (kFed) {
      return Stream(ring, state_.s.ring, state_.fixed.meeting);
    } else {
      return Stream(ring);
    }
  }
  __device__ __forceinline__ DecodeOrder order() const { return {state_.s, state_.layers}; }
  __device__ __forceinline__ bool has_product(const DecodePlace& p) const { return order().has_product(p); }
  /// Who goes through a routed layer; what comes next.
  __device__ __forceinline__ DecodePlace decide(int layer, const DecodePlace& expected) {
    DecodeDecision(state_).decide(state_.layers[layer]);
    const bool is_computed = state_.fixed.deals[1].rows > 0;
    const DecodePlace known = order().after_decision(layer, is_computed);
    if constexpr (kFed) {
      const int number = state_.layers[layer].routed;
      if (state_.thread == 0)
        tell(state_.fixed.meeting.decided[number],
             static_cast<int>(is_computed ? Decided::Computed : Decided::Skipped));
      if (!(known == expected))
        stream_.give_up(state_.fixed.meeting, number, state_.matrix(expected.product));
    }
    return known;
  }
  __device__ __forceinline__ const __nv_bfloat16* numbers_of(const DecodePlace& p) const {
    return static_cast<const __nv_bfloat16*>(order().weights_of(p));
  }
  __device__ __forceinline__ DecodeCodes codes_of(const DecodePlace& p) const {
    return {static_cast<const unsigned char*>(order().weights_of(p)), state_.scales_of(p)};
  }
  /// The weights begin to come.
  __device__ __forceinline__ void open(const DecodePlace& p) {
    if constexpr (kCodes) {
      if (is_of_layer(p.product)) {
        codes_.open(codes_of(p), state_.matrix(p.product));
        return;
      }
    }
    if constexpr (!kFed)
      stream_.open(numbers_of(p), state_.matrix(p.product), p.product == DecodeProduct::Mix && follows_);
  }
  /// The staged rows times what is open, if there is a product. Whether the next one's weights are on their
  /// way already: those of codes come behind their own, but not before attention, in the way of its entries.
  __device__ __forceinline__ bool multiply(const DecodePlace& now) {
    if constexpr (kCodes) {
      if (is_of_layer(now.product)) {
        const DecodePlace next = order().expected_after(now);
        const bool follows = now.product != DecodeProduct::Project && is_of_layer(next.product);
        if (follows) codes_.then(codes_of(next), state_.matrix(next.product));
        codes_.rest();
        Results(state_).multiply(now, codes_);
        return follows;
      }
    }
    if constexpr (kCodes) codes_.close();
    if (has_product(now)) {
      if constexpr (!kFed) stream_.rest();
      Results(state_).multiply_numbers(now, stream_);
    }
    return false;
  }

  /// Fills what stays in shared memory. The first block also brings the tables up to date: new blocks hold no
  /// entries yet, so nobody wants these before the blocks have met.
  __device__ __forceinline__ void prepare() {
    const DecodeStep& s = state_.s;
    const int thread = state_.thread;
    copy_words(state_.layers, s.layers, s.depth);
    if constexpr (kCodes) copy_words(state_.scales, s.scales, s.depth);
    for (int i = thread; i < s.rows * kDim / 2; i += kDecodeThreads) {
      const Rotation r = rotation_at(s.row[i / (kDim / 2)].position, s.frequencies[i % (kDim / 2)]);
      state_.rotation[i] = float2{r.cosine, r.sine};
    }
    if (blockIdx.x == 0) {
      for (int i = thread; i < s.updates; i += kDecodeThreads) s.tables[s.update[i].at] = s.update[i].block;
      if (thread < s.rows) s.left->kept[thread] = 0;  // the same threads set its bits (DecodeDecision)
    }
    if (thread < s.rows) {
      const DecodeRow& row = s.row[thread];
      state_.fixed.tokens[thread] = row.follows < 0 ? row.token : s.before->token[row.follows];
      state_.fixed.kept_before[thread] = row.follows < 0 ? 0 : s.before->kept[row.follows];
    }
    if (thread == 0) {
      const auto deal = [&](DecodeProduct p, int rows, int width, int half) {
        if constexpr (kFed) {
          deal_lines(state_.matrix(p), rows, width, half, s.ring);
        } else {
          state_.matrix(p).deal(rows, width, half, kRing);
        }
      };
      deal(DecodeProduct::Decide, s.predictor_hidden, s.width, 0);
      deal(DecodeProduct::Project, (s.heads + 2 * s.kv_heads) * kDim, s.width, 0);
      deal(DecodeProduct::Mix, s.width, s.heads * kDim, 0);
      deal(DecodeProduct::Expand, 2 * s.hidden, s.width, s.hidden);
      deal(DecodeProduct::Contract, s.width, s.hidden, 0);
      deal(DecodeProduct::Head, s.vocab, s.width, 0);
    }
    if (thread == kDecodeThreads - 1) {
      AttentionDeal& dense = state_.fixed.deals[0];
      dense.rows = s.rows;
      for (int row = 0; row < s.rows; ++row) dense.row[row] = row;
      state_.deal_entries(-1);
    }
    if constexpr (kFed) make_barriers();
    __syncthreads();  // those who bring weights begin
    const bool has_piece = static_cast<int>(blockIdx.x) < state_.fixed.deals[0].blocks;
    if (has_piece && state_.lane == 0) {
      const AttentionPiece& piece = state_.fixed.first[0];
      state_.fixed.first_keys[state_.warp] =
          kKv == 16 ? first_keys_of<kDim>(s, piece) : first_block_of(s, piece);
    }
    // Behind W_o come gate and up, where both together are more than the ring holds (else their loads would
    // only be in the way of attention's) and where the ring's places are whole tiles (WeightStream::follow).
    const Matrix &mix = state_.matrix(DecodeProduct::Mix), &expand = state_.matrix(DecodeProduct::Expand);
    follows_ =
        !kCodes && !kFed && mix.width == expand.width && mix.places_are_whole_tiles() &&
        (mix.tiles + expand.tiles) * 8 * mix.width * static_cast<int>(sizeof(__nv_bfloat16)) > ring_bytes(s);
    sync_workers();
  }

  __device__ __forceinline__ void make_barriers() {
    RingMeeting& meeting = state_.fixed.meeting;
    for (int i = state_.thread; i < kDecodeFeeders * kRingBatches; i += kDecodeThreads)
      make_barrier(meeting.there[i / kRingBatches][i % kRingBatches], 32);
    for (int i = state_.thread; i < kDecodeFeeders * kFedRingMost; i += kDecodeThreads)
      make_barrier(meeting.read[i / kFedRingMost][i % kFedRingMost], kFedWarps);
    if (state_.thread < kDecodeRouted) meeting.decided[state_.thread] = 0;
    if (state_.thread < kDecodeFeeders) meeting.given_up[state_.thread] = 0;
  }
  template <typename Item>
  __device__ __forceinline__ void copy_words(Item* to, const Item* from, int items) const {
    const int words = items * static_cast<int>(sizeof(Item) / sizeof(unsigned));
    for (int i = state_.thread; i < words; i += kDecodeThreads)
      reinterpret_cast<unsigned*>(to)[i] = reinterpret_cast<const unsigned*>(from)[i];
  }

  /// `first_keys`: of this warp, in DecodeFixed; negative: to be looked up.
  __device__ __forceinline__ auto begin(const DecodeLayer& layer, const AttentionPiece& piece,
                                        std::int64_t first_keys) const {
    if constexpr (kKv == 16) {
      return begin_piece<kDim>(state_.s, layer, piece, first_keys);
    } else {
      const unsigned char* const ring = state_.room - (state_.layout.room - state_.layout.ring);
      return begin_code_piece<kDim, kKv, kRing>(state_.s, layer, piece, static_cast<int>(first_keys),
                                                shared_address(ring) + threadIdx.x * 16);
    }
  }

  /// Between the arrival of the projection and its being seen: entries of earlier steps wait for nothing.
  /// Leaves attention in pieces, or joined in `mixed`; the weights of the next product are on their way.
  __device__ __forceinline__ void attend(const DecodeLayer& layer, const DecodePlace& next) {
    constexpr int kJoinedByAll = 16;  // pieces of a head, of all rows, that each block may join for itself
    const DecodeStep& s = state_.s;
    if constexpr (kCodes) {
      stream_.close();
      codes_.close();
    }
    auto& room = *reinterpret_cast<AttentionRoom<kDim>*>(state_.room);
    const AttentionDeal& d = state_.deal(layer);
    const int block = static_cast<int>(blockIdx.x);
    int at = block, end = d.blocks;
    if (d.even) {
      at = block < d.blocks ? d.first_step(block) : 0;
      end = block < d.blocks ? d.first_step(block + 1) : 0;
    }
    const int which = layer.routed >= 0 ? 1 : 0;
    bool first = true;
#pragma unroll 1
    do {
      const bool has_piece = at < end;
      const AttentionPiece piece = !has_piece ? AttentionPiece{}
                                   : first    ? state_.fixed.first[which]
                                              : d.piece_at(s, at, end);
      const std::int64_t first_keys =
          first && which == 0 ? state_.fixed.first_keys[state_.warp] : std::int64_t{-1};
      auto walk = begin(layer, piece, first_keys);
      if (first) state_.meet();
      const std::int64_t entry_block = new_entry_block(s, layer, piece);
      if (has_piece) {
        const float2* const rotation = state_.rotation + piece.row * (kDim / 2);
        if constexpr (kKv == 16) {
          attend_entries<kDim>(s, layer, piece, rotation, walk, room);
        } else {
          attend_codes<kDim, kKv>(s, layer, piece, rotation, entry_block, walk, room);
        }
      }
      // Weights behind the entries: what is asked for comes in turn. Codes of entries come through their
      // ring.
      const auto then = [&] {
        return at + (d.even ? piece.range.end - piece.range.first : static_cast<int>(gridDim.x));
      };
      if (!kCodes && (kKv == 16 ? first : then() >= end)) open(next);
      first = false;
      if (!has_piece) break;
      if constexpr (kKv == 16) {
        leave_piece<kDim>(s, piece, walk, entry_block, room);
      } else {
        leave_code_piece<kDim, kKv>(s, piece, walk, room);
      }
      at = then();
    } while (at < end);
    state_.grid.arrive();
    // Codes are a quarter as much, and here no register has to hold their way.
    if constexpr (kCodes) open(next);
    if constexpr (!kFed) {
      if (follows_)
        stream_.follow(numbers_of({DecodeProduct::Expand, next.layer}), state_.matrix(DecodeProduct::Expand));
    }
    state_.meet();
    state_.joined = d.pieces * d.rows > kJoinedByAll;
    if (!state_.joined) return;
    Stage(state_).join(layer);
    state_.grid.arrive();
    state_.meet();
  }

  DecodeState state_;
  Stream stream_;
  std::conditional_t<kCodes, CodeStream<kRing>, NoCodes> codes_;
  bool follows_ = false;  // the weights of Expand come behind those of Mix
};

template <int kHalves, int kRing, int kDim, int kBits, int kKv>
__global__ void __launch_bounds__(kDecodeThreads +
                                      (kHalves == 1 && kBits == 16 && kKv == 16 ? 32 * kDecodeFeeders : 0),
                                  1) decode_kernel(const __grid_constant__ DecodeStep s) {
#if __CUDA_ARCH__ >= 900  // what it is measured on; open_decoder() looks
  extern __shared__ __align__(128) unsigned char shared[];
  using Whole = DecodeWhole<kHalves, kRing, kDim, kBits, kKv>;
  if constexpr (Whole::kFed) {
    if (threadIdx.x >= kDecodeThreads) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
      Whole::feed(s, shared);
      return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
  }
  Whole(s, shared).run();
#endif
}

/// Of the kernels over caches of kKv bits the one of this kind. InternalError: there is none.
template <int kKv>
const void* decode_kernel_over(const DecodeKind& k) {
  const auto of_heads = [&]<DecodeRing kAhead, int kBits>() -> const void* {
    constexpr int kHalves = halves_of(kAhead), kRing = places_of(kAhead, kBits);
    if (k.head_dim == 64) return reinterpret_cast<const void*>(decode_kernel<kHalves, kRing, 64, kBits, kKv>);
    if (k.head_dim == 128)
      return reinterpret_cast<const void*>(decode_kernel<kHalves, kRing, 128, kBits, kKv>);
    throw InternalError("[decode_step] heads of 64 or 128 elements");
  };
  const auto of_rings = [&]<int kBits>() -> const void* {
    if (k.ring == DecodeRing::Long) return of_heads.template operator()<DecodeRing::Long, kBits>();
    if constexpr (has_ring(DecodeRing::Medium, kBits, kKv)) {
      if (k.ring == DecodeRing::Medium) return of_heads.template operator()<DecodeRing::Medium, kBits>();
    }
    return of_heads.template operator()<DecodeRing::Short, kBits>();
  };
  return k.bits == 16 ? of_rings.template operator()<16>() : of_rings.template operator()<4>();
}

}  // namespace fathom::cuda
