// What the kernels of a decoding step get (device/decode_whole.cuh), and where they work.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

namespace fathom::cuda {

inline constexpr int kDecodeRows = 16;  // of a step, at the most: what two halves of a tensor-core tile hold
inline constexpr int kDecodeRouted = 64;    // routed layers, at the most
inline constexpr int kDecodeLayers = 256;   // of both kinds, at the most
inline constexpr int kDecodeGroup = 8;      // query heads of a key/value head, at the most
inline constexpr int kDecodeSplits = 40;    // pieces of a row's entries for one head, at the most ([splits])
inline constexpr int kDecodeUpdates = 64;   // entries of the tables that a launch brings along, at the most
inline constexpr int kDecodeThreads = 256;  // of a block, that compute
inline constexpr int kDecodeWarps = kDecodeThreads / 32;
inline constexpr int kDecodeFeeders = 4;  // warps beside these, which bring weights, where there are any
inline constexpr int kCodeRun = 128;  // columns of codes that a warp takes at once: their rows are multiples

/// A layer's parameters (kernels/decoder.h); null: it has none.
struct DecodeLayer {
  const void *qkv, *out, *gate_up, *down;  // numbers of bf16, or codes of 4 bits
  const __nv_bfloat16* predictor_in;
  const float *input_norm, *post_norm, *q_norm, *k_norm;
  const float *router, *predictor_bias, *predictor_out, *predictor_last;
  int routed;  // its number among the routed layers, or -1
  int dense;   // its number among the dense ones, or -1
};

/// The scales of a layer's codes: of qkv, out, gate_up and down.
struct DecodeScales {
  const float* of[4];
};

/// A row's best id of those that one block of threads looked at.
struct DecodeCandidate {
  float value;
  int id;
  int finite;  // all that it looked at
};

struct DecodeRow {
  int slot, token, position;
  int held;                   // entries of dense layers
  int follows;                // the row of the launch before that is the same text's, or -1 (DecodeBefore)
  float inverse_temperature;  // 0: the most likely token
  int wants_share;            // of it, in softmax(logits)
  float threshold;            // of a decision's logit
  double uniform;             // of [0, 1): what is drawn
};

/// An entry of the tables: a block that holds no entries yet.
struct DecodeUpdate {
  int at;
  int block;
};

/// What the host reads afterwards. `kept`: by routed layer.
struct DecodeOutcome {
  int token[kDecodeRows];
  int finite[kDecodeRows];
  float share[kDecodeRows];
  std::uint8_t kept[kDecodeRouted][kDecodeRows];
};

/// What a launch leaves for the next one, which the host may have put in line before it has seen any of it: a
/// row that follows another takes its token, and counts what it kept.
struct DecodeBefore {
  int token[kDecodeRows];
  unsigned long long kept[kDecodeRows];  // a bit for each routed layer
};

struct DecodeStep {
  // The model
  const DecodeLayer* layers;
  const DecodeScales* scales;  // null: matrices are numbers
  const __nv_bfloat16 *embedding, *head;
  const float* final_norm;
  const float* frequencies;  // of RoPE, [d/2]
  int depth, vocab, choices, width, hidden, predictor_hidden, heads, kv_heads;
  float norm_eps, qk_eps, score_scale;  // the last one with log2(e): exponentials are powers of two
  int gate;                             // GateKind
  int bits;                             // of the layers' products: 16 or 4
  int group;                            // columns that share a scale; 0: one scale a row
  int by_predictor;
  int routed_layers;
  // The cache
  __nv_bfloat16* pool;   // or codes: below
  std::int32_t* tables;  // [slots][1 + routed layers][most_blocks]
  int block, stride, most_blocks;
  // Work: what one phase leaves for the next
  float* x;                     // the residual stream, [rows][D]
  float* branch;                // attention's output, [rows][D]
  __nv_bfloat16* to_norm;       // the stream, or with the branch, as norms and routers read it, [rows][D]
  float* qkv;                   // [rows][(H+2G)*d]
  __nv_bfloat16* parts;         // attention over a piece of the entries, [rows*H][splits][d]
  float2* part_weights;         // its greatest score and its sum of exponentials, [rows*H][splits]
  __nv_bfloat16* mixed;         // attention before its projection, where joined by a phase, [rows][H*d]
  __nv_bfloat16* activations;   // [rows][F]
  float* predicted;             // predictors' hidden layers, [2][rows][P]
  float* logits;                // [rows][V]
  DecodeCandidate* candidates;  // [blocks][rows]
  float* sums;                  // of exponentials, [rows][blocks]
  unsigned* arrivals;           // two counters, taken in turn
  int turn;                     // 0 or 1, this launch's
  DecodeOutcome* outcome;       // mapped host memory
  DecodeBefore* left;           // the same for the next launch
  const DecodeBefore* before;   // by the last one
  // The rows
  int rows;
  int ring;  // places, where warps of their own bring the weights
  int updates;
  DecodeRow row[kDecodeRows];
  DecodeUpdate update[kDecodeUpdates];
  std::int32_t entries[kDecodeRows][kDecodeRouted];  // before the new one, by routed layer
  // Caches of codes
  int kv_bits;           // 16: numbers. 8 or 4: codes (kernels/cache_codes.h)
  int transforms_heads;  // queries and keys, behind RoPE; with codes alone
  const float*
      key_means;  // [dense layers, then routed ones][G][d], what keys lose; with codes alone, or null
};

/// Loads of weights that are on their way: the more rows, the less room there is for them.
enum class DecodeRing : int { Long, Medium, Short };
/// Eights of rows.
constexpr int halves_of(DecodeRing r) { return r == DecodeRing::Short ? 2 : 1; }
/// Its places, of kRingLoad bytes each. `bits`: of the weights of layers; codes come two loads at a time.
constexpr int places_of(DecodeRing r, int bits) {
  if (r == DecodeRing::Short) return 8;
  const bool is_long = r == DecodeRing::Long;
  return bits == 16 ? (is_long ? 33 : 22) : (is_long ? 32 : 16);
}
inline constexpr int kRingLoad = kDecodeThreads * 16;

/// Whether weights are brought by warps of their own: numbers, over caches of numbers. Their ring has as many
/// places as there is room for (DecodeStep::ring).
constexpr bool is_fed(DecodeRing r, int bits, int kv_bits) {
  return r == DecodeRing::Long && bits == 16 && kv_bits == 16;
}
/// Where it takes what room there is, there is no shorter one.
constexpr bool has_ring(DecodeRing r, int bits, int kv_bits) {
  return r != DecodeRing::Medium || !is_fed(DecodeRing::Long, bits, kv_bits);
}
inline constexpr int kFedRingMost = 52, kFedRingLeast = 16;

/// Which of the kernels over one kind of cache.
struct DecodeKind {
  DecodeRing ring;
  int head_dim, bits;
};
/// Those over caches of codes, of 8 and of 4 bits. InternalError: heads that are not 64 or 128 wide.
const void* decode_kernel_kv8(const DecodeKind& k);
const void* decode_kernel_kv4(const DecodeKind& k);

/// Shared memory of a launch. What is left of a multiprocessor's 256 KB is its first cache, and entries that
/// attention has asked for (64 KB at once) need room there until they come: a long ring makes weights come
/// without a pause and entries slowly.
struct DecodeRoom {
  int ring = 0;  // its places
  std::size_t shared_bytes = 0;
};
inline constexpr int kDecodeRooms = 3;

/// A kernel for so many rows.
struct DecodePlan {
  const void* kernel = nullptr;  // none: the rows do not fit
  int threads = 0;
  DecodeRoom rooms[kDecodeRooms] = {};  // the more of what is read are entries, the further on

  /// `entries`: bytes of entries that a step reads, for each byte of weights. The borders are where times
  /// crossed (an H200, d1b, docs/log.md).
  const DecodeRoom& room_for(double entries) const {
    return rooms[entries < 0.3 ? 0 : entries < 1.7 ? 1 : 2];
  }
};

/// Of `s` the sizes alone are read. `blocks` blocks of threads that may take
/// `shared` bytes of shared memory each. InternalError: heads that are not 64 or 128 wide, caches not of 16,
/// 8 or 4 bits.
DecodePlan plan_decode(const DecodeStep& s, int head_dim, int rows, int blocks, std::size_t shared);
/// Once for each plan, before its first launch.
void prepare_decode(const DecodePlan& plan, std::size_t shared);
/// `room`: one of the plan's; its ring is the step's.
void launch_decode(const DecodePlan& plan, const DecodeRoom& room, const DecodeStep& s, int blocks,
                   cudaStream_t stream);

}  // namespace fathom::cuda
