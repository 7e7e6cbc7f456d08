// Keys and values of earlier passes: how a forward pass goes on from them.
#pragma once

#include <cstdint>

#include "src/autograd/context.h"

namespace fathom {

/// A pass over new rows of several sequences (Batch::cache) asks it, layer by layer, for their attention. Of
/// a routed layer it gets the rows that the layer kept, and holds these alone: a skipped token is no key.
class AttentionCache {
 public:
  virtual ~AttentionCache() = default;
  /// The rows that a routed layer keeps, before anything is computed of them: a cache that has to look at
  /// them does it now, while the device has nothing else to do.
  virtual void expect(Context& c, std::int64_t layer, const Tensor& kept) = 0;
  /// Adds the rows' keys and values to their sequences' entries of the layer, then lets each row see the
  /// entries of its sequence up to its own: [rows, H*d]. qkv [rows, (H+2G)*d] after RoPE. `kept` int32: which
  /// rows of the batch these are, ascending, as expect() had them; undefined: all.
  virtual Tensor attend(Context& c, std::int64_t layer, const Tensor& qkv, const Tensor& kept) = 0;
};

}  // namespace fathom
