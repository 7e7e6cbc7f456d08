// Weights rounded to the nearest of few values, each on its own (RTN): symmetric, a scale a row or a group of
// a row's columns (QuaRot: Ashkboos et al. 2024, arXiv 2404.00456, section 4, stage 2).
//
//   scale = clip * max |w| / (2^(b-1) - 1),   code = w / scale to the nearest, ties to even,
//   and then to -2^(b-1) .. 2^(b-1) - 1.
//
// Clipping makes the few largest weights worse and all others better. `clip` is searched for each group: of
// 1, 1 - 2^-(b-1) and 63/64, 62/64, ... 8/64 the first with the least sum of squared errors, which is never
// worse than 1. The second lets a group whose largest weight is negative give it the lowest code.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "infer/quant/quantized_matrix.h"

namespace fathom {

enum class Clip : std::uint8_t {
  None,          // 1
  LeastSquares,  // sum of (w - q)^2
  Weighted,      // sum of h (w - q)^2, h the importance of the column
};

struct WeightFormat {
  int bits = 4;            // 4 or 8
  std::int64_t group = 0;  // columns that share a scale; 0: one a row
  Clip clip = Clip::LeastSquares;

  std::int64_t group_of(std::int64_t columns) const { return group == 0 ? columns : group; }
};

/// The code of one weight; `inverse` is 1 / scale.
inline std::int8_t code_of(double w, double inverse, int bits) {
  const double least = -static_cast<double>(1 << (bits - 1)), most = -least - 1;
  // Numbers of this size have no fraction in double: adding rounds to the nearest, ties to even.
  constexpr double kNoFraction = 0x1.8p52;
  const double clamped = std::clamp(w * inverse, least, most);
  return static_cast<std::int8_t>(clamped + kNoFraction - kNoFraction);
}

/// The scale of the weights of a group, finite, positive, and such that the lowest code times it is a float;
/// 1 for a group of zeros or of numbers so small that no float is their scale: its codes are zero.
/// `importance` is read under Clip::Weighted only; all of it zero stands for all of it one.
float scale_of(std::span<const double> w, int bits, Clip clip, std::span<const double> importance);

/// `w` [rows][columns]. `importance` [columns]: non-negative, as the diagonal of a Hessian; needed under
/// Clip::Weighted. UserError: weights that are not finite, and what check_quantized_format() refuses.
/// InternalError: sizes that do not fit.
QuantizedMatrix round_to_nearest(std::span<const float> w, std::int64_t rows, std::int64_t columns,
                                 const WeightFormat& format, std::span<const double> importance = {});

/// UserError for the first weight that is not finite, with its row and column; InternalError for another
/// number of weights than rows * columns.
void check_weights(std::span<const float> w, std::int64_t rows, std::int64_t columns);

}  // namespace fathom
