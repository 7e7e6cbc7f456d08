// Hadamard matrices of many orders, and the transform by them: entries of 1 and -1, rows orthogonal. What a
// vector's few large elements become when they are spread over all of it (QuaRot: Ashkboos et al. 2024,
// arXiv 2404.00456).
//
// An order is K * 2^m. The 2^m part is Sylvester's, applied in n log n; the K x K part is constructed:
// Paley 1933, from the squares of a finite field of q elements, q = 3 (mod 4): K = q + 1, and q = 1 (mod 4):
// K = 2 (q + 1), q a prime or the square of one; and for 156 and 172 Goethals and Seidel 1967, from four
// circulant matrices.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fathom {

/// A Hadamard matrix [order, order] by rows; empty where these constructions give none of this order, as for
/// 92, 116, 184 and 188, and for some that are an even one's half times two.
std::vector<std::int8_t> hadamard_matrix(std::int64_t order);

/// x -> H x / sqrt(block), for each block of x: orthogonal. H = H_K (x) H_(2^m); where no such matrix, of K
/// up to 512, has the whole size, the largest one that divides it stands along the diagonal.
class HadamardTransform {
 public:
  /// InternalError: no positive size.
  explicit HadamardTransform(std::int64_t size);

  std::int64_t size() const { return size_; }
  std::int64_t block() const { return factor_ * power_; }
  /// K, of a block.
  std::int64_t factor() const { return factor_; }
  /// H_K by rows.
  std::span<const std::int8_t> matrix() const { return matrix_; }
  void apply(std::span<double> x) const;

 private:
  std::int64_t size_ = 1, factor_ = 1, power_ = 1;
  std::vector<std::int8_t> matrix_;  // H_K
};

}  // namespace fathom
