// The Hessians of a model's products, from what a calibrating forward pass shows of their inputs.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "infer/quant/hessian.h"
#include "src/model/product_input.h"

namespace fathom {

/// H = sum g^2 x x^T of each product, or each expert's: g as ProductInput::gates has it. Memory:
/// 8 columns^2 bytes for each that has seen a token.
class ProductHessians {
 public:
  /// Adds the rows that are shown; not longer than this object.
  ProductObserver observer();

  /// Null: no token came to it.
  const Hessian* find(const std::string& parameter, std::int64_t expert = 0) const;
  std::int64_t tokens(const std::string& parameter, std::int64_t expert = 0) const;

 private:
  std::map<std::pair<std::string, std::int64_t>, Hessian> hessians_;
};

}  // namespace fathom
