// What a layer's inputs make of an error in its weights: for y = W x the squared error of the outputs, summed
// over tokens, is tr((W - Q) H (W - Q)^T) with H = sum g^2 x x^T (GPTQ: Frantar et al. 2022, arXiv
// 2210.17323, section 3.1, without its factor 2 / tokens, on which nothing depends). g is the factor by which
// a token's output is multiplied behind the layer, such as a router's gate, 1 for most layers.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "infer/quant/quantized_matrix.h"

namespace fathom {

/// Memory: 8 columns^2 bytes, and while add() runs 1 KB a column. Sums are in double, in the order of the
/// tokens, and the same for any number of threads and any division of the tokens into multiples of 128.
class Hessian {
 public:
  /// InternalError: no columns.
  explicit Hessian(std::int64_t columns);
  /// Of a sum made elsewhere, [columns][columns], whose upper triangle is read.
  Hessian(std::int64_t columns, std::vector<double> sum, std::int64_t tokens);

  /// `x` [tokens][columns], `gates` [tokens] or empty. Numbers that are not finite go into the sum, where
  /// gptq() finds them. InternalError: sizes that do not fit.
  void add(std::span<const float> x, std::span<const float> gates = {});
  /// InternalError: another number of columns.
  void merge(const Hessian& other);
  /// A sum over `tokens` made elsewhere in fp32, [columns][columns]. InternalError: another size.
  void add_sum(std::span<const float> sum, std::int64_t tokens);

  std::int64_t columns() const { return columns_; }
  std::int64_t tokens() const { return tokens_; }
  double at(std::int64_t i, std::int64_t j) const {
    return sum_[static_cast<std::size_t>(i <= j ? i * columns_ + j : j * columns_ + i)];
  }
  std::vector<double> diagonal() const;

 private:
  std::int64_t columns_, tokens_ = 0;
  std::vector<double> sum_;  // right in the upper triangle
};

/// tr((W - Q) H (W - Q)^T), w [rows][columns] of q's sizes: what q costs. InternalError: sizes that do not
/// fit.
double quantization_loss(std::span<const float> w, const QuantizedMatrix& q, const Hessian& h);
/// The same as a share of tr(W H W^T), what codes of zeros would cost; 0 where that is nothing.
double relative_loss(std::span<const float> w, const QuantizedMatrix& q, const Hessian& h);

}  // namespace fathom
