// What of a model has few bits: the weights of its products, the rows that they read, and the keys and values
// in its caches; and what is transformed while it runs. Embeddings, the head, norms, routers and predictors
// are as they were: what reads the stream to decide must not be rounded, and the others are few.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>

#include "kernels/packed_matrix.h"
#include "src/nn/parameters.h"

namespace fathom {

/// Hadamard transforms while the model runs (infer/quant/rotate.h has what undoes them).
struct OnlineHadamards {
  bool down = false;   // over the MLP's hidden width, of what down_proj reads; one for all experts
  bool heads = false;  // over the query heads, element by element, of what o_proj reads
  bool queries_keys =
      false;  // over each query's and each key's elements, behind RoPE: for caches of few bits

  bool any() const { return down || heads || queries_keys; }
  bool operator==(const OnlineHadamards&) const = default;
};

struct Quantization {
  std::string method = "rtn";  // what chose the codes: "rtn", "gptq", "quarot"; "rotate-only" has none
  int bits = 4;                // of weights: 4 or 8; 16: they are numbers, and `kinds` is empty
  std::int64_t group = 0;      // columns that share a scale; 0: one scale a row
  std::optional<std::uint64_t> rotation_seed = {};  // of the rotation before, if there was one
  int kv = 16;                                      // of keys and values: kernels/cache_codes.h
  bool key_means = false;  // keys become codes without the calibration's mean (Transformer::set_key_means)
  /// Kinds of products, of all layers and all experts.
  std::set<std::string> kinds = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"};
  /// Of the rows that these products read: 4 or 8, symmetric, a scale a row; 16: numbers.
  int activations = 16;
  double activation_clip = 1.0;  // of a row's largest magnitude
  OnlineHadamards online = {};

  bool operator==(const Quantization&) const = default;

  bool has_packed_weights() const { return bits < 16; }
  /// Whether this parameter is of few bits.
  bool holds(const ParameterSpec& spec) const;
  /// How its rows lie. UserError: they cannot be cut into groups, or are too long to be multiplied by codes.
  PackedFormat format(const ParameterSpec& spec) const;
};

/// The share of a row's range that codes of so many bits span (QuaRot, section 4): 0.9 of 4, 1 of 8 bits.
double default_activation_clip(int bits);

/// "qkv_proj", "o_proj", "gate_up_proj" or "down_proj", whether of a block or of its experts; "": the
/// parameter is no product of a block.
std::string product_kind(const ParameterSpec& spec);

}  // namespace fathom
