// What the products of blocks read, for those who measure it, such as the Hessians of GPTQ.
#pragma once

#include <concepts>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/dtype.h"

namespace fathom {

/// Rows that a product y = x W^T reads, on the host, before it is computed: behind their Hadamard transform,
/// where there is one, and before they become codes.
struct ProductInput {
  std::string parameter;    // W's name: "model.layers.3.mlp.down_proj.weight"
  std::int64_t expert = 0;  // 0 where there are none
  std::int64_t columns = 0;
  std::vector<float> x;  // [rows][columns]; empty where `on_device` has them
  /// The same, where the model computes and in its dtype, for as long as the observer is called: for one that
  /// asked for it, of a block's own products whose rows are not multiplied.
  ConstView on_device = {};
  /// By what the model multiplies each row of y, [rows], where y is added to the stream and is multiplied:
  /// of o and down in a routed block the router's gate, of an expert's down what the token gives the expert
  /// (times the gate). Empty: by 1.
  std::vector<float> gates;
};

/// Sees the inputs of qkv_proj, o_proj, gate_up_proj and down_proj in the order in which a block computes
/// them, and of products of experts one expert after the other, without empty slots. A product that has no
/// row, of a block or an expert that no token went to, is not shown.
class ProductObserver {
 public:
  enum class Reads : std::uint8_t { Host, DeviceWherePossible };

  ProductObserver() = default;
  template <typename See>
  requires std::invocable<See&, const ProductInput&> ProductObserver(
      See see, Reads reads = Reads::Host)  // NOLINT(google-explicit-constructor): a function
      : see_(std::move(see)), reads_(reads) {}

  explicit operator bool() const { return static_cast<bool>(see_); }
  Reads reads() const { return reads_; }
  void operator()(const ProductInput& input) const { see_(input); }

 private:
  std::function<void(const ProductInput&)> see_;
  Reads reads_ = Reads::Host;
};

}  // namespace fathom
