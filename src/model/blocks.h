// What the blocks of the transformer pass to each other; private to src/model.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "src/model/transformer.h"

namespace fathom {

/// "model.layers.3.NAME"
std::string layer_name(std::int64_t layer, const char* name);

/// g(r) of the rows that a routed block kept, on the host.
std::shared_ptr<const std::vector<float>> gates_of(Context& c, const RoutedLayer& routed, Gate gate);

/// The rows that a block works on: all B*T of them, or those that a routed block kept.
struct Transformer::Rows {
  std::int64_t batch = 0;
  std::int64_t seq = 0;
  Tensor positions;  // original positions, also of kept rows
  Tensor documents;  // over the whole batch, never falling
  bool document_mask = false;
  Tensor first_key;  // the first key that each row sees; undefined: its sequence's first
  /// What the experts of the block decide for these rows; null: its MLP is dense.
  std::shared_ptr<ExpertLayer> experts;
  /// Each row chooses, and is chosen, by itself alone.
  std::optional<Causal> causal = {};
  AttentionCache* cache = nullptr;
  Tensor kept = {};  // with a cache: which of the batch's rows these are; undefined: all
  /// Not null: sees what the block's products read.
  const ProductObserver* observe = nullptr;
  const KeyObserver* observe_keys = nullptr;
  /// By what a routed block multiplies what it adds to each row, where that is observed; null: by 1.
  std::shared_ptr<const std::vector<float>> gates = {};
};

/// Of a product of experts, whose rows are slots.
struct Transformer::Slots {
  const Tensor& weights;  // what each row gives its choices [choices, rows]
  const ops::Dispatch& dispatch;
};

/// The residual stream is x + delta. Behind a block of all tokens with experts the sum is left to the norm
/// that reads it; else delta is undefined.
struct Transformer::Stream {
  Tensor x;
  Tensor delta;
};

}  // namespace fathom
