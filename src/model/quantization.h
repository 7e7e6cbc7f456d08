// Which of a model's products have weights of few bits. Embeddings, the head, norms, routers and predictors
// never have: what reads the stream to decide must not be rounded, and the others are few.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>

#include "kernels/packed_matrix.h"
#include "src/nn/parameters.h"

namespace fathom {

struct Quantization {
  std::string method = "rtn";                       // what chose the codes: "rtn", "gptq", "quarot"
  int bits = 4;                                     // 4 or 8
  std::int64_t group = 0;                           // columns that share a scale; 0: one scale a row
  std::optional<std::uint64_t> rotation_seed = {};  // of the rotation before, if there was one
  /// Kinds of products, of all layers and all experts.
  std::set<std::string> kinds = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"};

  bool operator==(const Quantization&) const = default;

  /// Whether this parameter is of few bits.
  bool holds(const ParameterSpec& spec) const;
  /// How its rows lie. UserError: they cannot be cut into groups.
  PackedFormat format(const ParameterSpec& spec) const;
};

/// "qkv_proj", "o_proj", "gate_up_proj" or "down_proj", whether of a block or of its experts; "": the
/// parameter is no product of a block.
std::string product_kind(const ParameterSpec& spec);

}  // namespace fathom
