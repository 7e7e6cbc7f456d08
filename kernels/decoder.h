// A whole step of decoding as one op: the next token of a few texts at once, from the embedding to the
// choice. At so few rows a model is bound by reading its weights, and what each op of its own costs (a
// launch, a wait for all of the one before) is as much as the reading; so a backend that can does all in one
// piece.
//
// Shapes: M rows (texts), D width, H query heads, G key/value heads, d head size, F hidden width of the MLP,
// P hidden width of a predictor, V vocabulary. Matrices are of the compute dtype, those of a layer's products
// perhaps of few bits, vectors fp32.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "kernels/packed_matrix.h"

namespace fathom {

/// A matrix of a layer's products: numbers of the compute dtype, or codes with scales. A product with codes
/// is the one with scale * code, whose rows are numbers.
struct DecoderMatrix {
  ConstView numbers;  // undefined: it has codes
  PackedView codes;

  bool is_packed() const { return !numbers; }
};

struct DecoderLayer {
  ConstView input_norm;      // [D]
  DecoderMatrix qkv;         // [(H+2G)*d, D]
  ConstView q_norm, k_norm;  // [d]; undefined: no QK-norm
  ConstView key_means;       // fp32 [G, d]: what keys lose before they become codes; undefined: nothing
  DecoderMatrix out;         // [D, H*d]
  ConstView post_norm;       // [D]
  DecoderMatrix gate_up;     // [2F, D], gate first
  DecoderMatrix down;        // [D, F]
  // A routed layer computes the rows whose decision is above their threshold, and the others not at all.
  bool routed = false;
  ConstView router;                         // [D]
  ConstView predictor_in, predictor_bias;   // [P, D], [P]; undefined where the router itself decides
  ConstView predictor_out, predictor_last;  // [P], [1]
};

struct DecoderModel {
  std::int64_t vocab = 0;
  std::int64_t choices = 0;  // only ids below this are chosen
  std::int64_t width = 0;
  std::int64_t hidden = 0;            // F
  std::int64_t predictor_hidden = 0;  // P
  double norm_eps = 1e-5;
  QkvShape qkv;  // heads, RoPE; its rows are not read
  GateKind gate = GateKind::Raw;
  ConstView embedding;   // [V, D]
  ConstView final_norm;  // [D]
  ConstView head;        // [V, D]
  std::vector<DecoderLayer> layers;
  /// Queries and keys are Hadamard-transformed behind RoPE, each over its d elements (kernels/hadamard.h).
  bool transforms_heads = false;
  /// The cache, of numbers or of codes: of its fields rows, sequences and offset are not read. Dense layer
  /// number i has block b * stride + i of the pool for a block b of its table, routed layers have block b.
  CacheShape cache;
  View pool;
  std::int64_t most_blocks = 0;  // that a table may hold
  std::int64_t most_rows = 0;    // of a step, wanted
  std::int64_t slots = 0;        // texts whose tables are held
};

struct DecoderRow {
  std::int64_t slot = 0;                  // whose tables are this text's
  std::int32_t token = 0;                 // the last one that there is,
  std::int32_t position = 0;              // and its place in the text
  std::int32_t held = 0;                  // entries that dense layers have: fewer where some were chosen
  const std::int32_t* entries = nullptr;  // those of the routed layers, in their order
  /// Which row of the step before, perhaps not over, is the same text's; -1: none. If there is one, `token`
  /// is what it chooses, and the layers that keep it have an entry more than `entries`.
  std::int32_t follows = -1;
  float threshold = 0;  // a routed layer computes it where its decision's logit is above
  /// 0: the most likely token. Else a token is drawn from softmax(logits / temperature), the one in which the
  /// share `uniform` of [0, 1) falls, the tokens' probabilities laid side by side in the order of their ids.
  double temperature = 0;
  double uniform = 0;
  bool wants_share = false;  // DecoderResult::share of the most likely token, which costs a moment more
};

struct DecoderResult {
  std::int32_t token = 0;
  bool finite = true;              // all of the row's logits
  float share = 0;                 // of the most likely token in softmax(logits), where that was wanted
  std::vector<std::uint8_t> kept;  // by routed layer
};

class Decoder {
 public:
  virtual ~Decoder() = default;
  /// Rows of one step at the most; no more than wanted.
  virtual std::int64_t most_rows() const = 0;
  /// Blocks `first`, ... of a slot's table: 0 is the dense layers', 1 + i that of routed layer number i.
  /// `hold_entries`: earlier entries lie in them, not only what is to come.
  virtual void set_blocks(std::int64_t slot, std::int64_t table, std::int64_t first,
                          std::span<const std::int32_t> blocks, bool hold_entries) = 0;
  /// Begins a step: adds the rows' entries to the cache and chooses the tokens that follow. Every slot has
  /// blocks for one more entry in each layer, and for one beside it where the row follows another. Waits for
  /// nothing; two steps at most are under way.
  virtual void launch(std::span<const DecoderRow> rows) = 0;
  /// The results of the earliest step under way, when it is over.
  virtual std::vector<DecoderResult> wait() = 0;
  /// Of row `i` of the step that wait() was for: the logits of all ids, fp32 [V], to the host.
  virtual void logits(std::int64_t i, std::span<float> out) = 0;
  /// The same where they lie, fp32 [V], for what is asked of the backend before the next launch. Undefined:
  /// they are not to be had so.
  virtual ConstView logits_in_place(std::int64_t) { return {}; }
};

}  // namespace fathom
