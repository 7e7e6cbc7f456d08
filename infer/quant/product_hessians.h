// The Hessians of a model's products, from what a calibrating forward pass shows of their inputs.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <utility>

#include "infer/quant/hessian.h"
#include "src/core/tensor.h"
#include "src/model/product_input.h"

namespace fathom {

class Context;

/// H = sum g^2 x x^T of each product, or each expert's: g as ProductInput::gates has it. Memory:
/// 8 columns^2 bytes for each that has seen a token.
class ProductHessians {
 public:
  /// In double, on the host.
  ProductHessians() = default;
  /// Where `device` computes, as gradients of weights are summed (fp32, and double beside fp64), some 2^18
  /// rows at a time (of fp32 rounded to bf16, on a GPU); these sums, and rows of experts and gated ones, in
  /// double on the host. Another 4 columns^2 bytes each, on the device. It outlives this object.
  explicit ProductHessians(Context& device) : device_(&device) {}

  /// Adds the rows that are shown; not longer than this object.
  ProductObserver observer();
  /// Once all is shown: before this, find() and tokens() do not know what was summed on the device.
  void collect();

  /// Null: no token came to it.
  const Hessian* find(const std::string& parameter, std::int64_t expert = 0) const;
  std::int64_t tokens(const std::string& parameter, std::int64_t expert = 0) const;

  /// relative_loss() of hessian.h; where a GPU computes, in fp32.
  double relative_loss(std::span<const float> w, const QuantizedMatrix& q, const Hessian& h) const;

 private:
  using Key = std::pair<std::string, std::int64_t>;
  struct DeviceSum {
    Tensor sum;  // [columns][columns]
    std::int64_t tokens = 0;
  };

  void add_on_device(const ProductInput& input);

  Context* device_ = nullptr;
  std::map<Key, Hessian> hessians_;
  std::map<Key, DeviceSum> sums_;
};

}  // namespace fathom
