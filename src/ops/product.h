// What products have in common: their weight, which may be of few bits.
#pragma once

#include <functional>
#include <memory>
#include <utility>

#include "src/ops/packed_tensor.h"

namespace fathom::ops {

/// Sees what a product is about to read: rows of `x`, which lie as the shape says.
using InputObserver = std::function<void(ConstView x, const LinearShape& s)>;

/// The weight of a product: a tensor, or, in a model without gradients, matrices of few bits.
class Weight {
 public:
  Weight(const Tensor& t) : tensor_(t) {}        // NOLINT: a tensor is a weight
  Weight(const PackedTensor& t) : packed_(t) {}  // NOLINT

  bool defined() const { return is_packed() || tensor_.defined(); }
  bool is_packed() const { return packed_.defined(); }
  const Shape& shape() const { return is_packed() ? packed_.shape : tensor_.shape(); }
  /// Undefined where it is packed.
  const Tensor& tensor() const { return tensor_; }
  const PackedTensor& packed() const { return packed_; }

  /// The same weight, whose products show `observer` what they read.
  Weight shown_to(InputObserver observer) const {
    Weight w = *this;
    w.observer_ = std::make_shared<const InputObserver>(std::move(observer));
    return w;
  }
  /// Null: nobody looks.
  const InputObserver* observer() const { return observer_.get(); }

 private:
  Tensor tensor_;
  PackedTensor packed_;
  std::shared_ptr<const InputObserver> observer_;
};

/// y = x W^T, or base + x W^T where base is defined. InternalError: a weight of few bits while a tape
/// records; it has no gradient.
void product(Context& c, View y, ConstView x, const Weight& w, const LinearShape& s, const Tensor& base = {});

}  // namespace fathom::ops
