// What the products of blocks read, for those who measure it, such as the Hessians of GPTQ.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace fathom {

/// Rows that a product y = x W^T reads, on the host, before it is computed: behind their Hadamard transform,
/// where there is one, and before they become codes.
struct ProductInput {
  std::string parameter;    // W's name: "model.layers.3.mlp.down_proj.weight"
  std::int64_t expert = 0;  // 0 where there are none
  std::int64_t columns = 0;
  std::vector<float> x;  // [rows][columns]
  /// By what the model multiplies each row of y, [rows], where y is added to the stream and is multiplied:
  /// of o and down in a routed block the router's gate, of an expert's down what the token gives the expert
  /// (times the gate). Empty: by 1.
  std::vector<float> gates;
};

/// Sees the inputs of qkv_proj, o_proj, gate_up_proj and down_proj in the order in which a block computes
/// them, and of products of experts one expert after the other, without empty slots. A product that has no
/// row, of a block or an expert that no token went to, is not shown.
using ProductObserver = std::function<void(const ProductInput&)>;

}  // namespace fathom
