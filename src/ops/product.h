// What products have in common: their weight, which may be of few bits.
#pragma once

#include <functional>
#include <memory>
#include <utility>

#include "src/ops/hadamard.h"
#include "src/ops/packed_tensor.h"

namespace fathom::ops {

/// What a product does with its rows before it multiplies them.
struct InputTransform {
  Hadamard hadamard;  // undefined: none
  int bits = 16;      // 4 or 8: rows become codes (Backend::quantize_rows). Of weights of few bits alone
  float clip = 1;     // of their range
};

/// Sees what a product is about to multiply, behind its Hadamard transform and as it is before it becomes
/// codes: rows of `x`, which lie as the shape says.
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

  /// The same weight, of rows that are transformed first.
  Weight of(InputTransform input) const {
    Weight w = *this;
    w.input_ = std::move(input);
    return w;
  }
  const InputTransform& input() const { return input_; }

 private:
  Tensor tensor_;
  PackedTensor packed_;
  InputTransform input_;
  std::shared_ptr<const InputObserver> observer_;
};

/// Rows as a product of codes reads them.
struct CodedRows {
  Tensor codes;   // uint8 [rows, row_bytes()]
  Tensor scales;  // fp32 [rows]
  PackedFormat format;

  bool defined() const { return codes.defined(); }
  PackedView view() const { return {codes, scales, format}; }
};

/// The rows that w's products read, made of `from` in one pass of the backend: w's transform and bits are
/// filled in here, and w's input() is done with. Undefined where there is no such pass, where w's products
/// read numbers, and where somebody looks at what they read.
CodedRows coded_rows(Context& c, CodeSource from, const Weight& w, const LinearShape& s);

/// y = x W^T, or base + x W^T where base is defined, of such rows.
void product(Context& c, View y, const CodedRows& x, const Weight& w, const LinearShape& s,
             const Tensor& base = {});

/// y = x W^T, or base + x W^T where base is defined, of rows of x as w's input() makes them. InternalError: a
/// weight of few bits or a transform while a tape records; they have no gradient.
void product(Context& c, View y, ConstView x, const Weight& w, const LinearShape& s, const Tensor& base = {});

}  // namespace fathom::ops
