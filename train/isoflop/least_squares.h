// Linear least squares of a few unknowns, by Householder QR. Small, dense, by hand: three to six columns.
#pragma once

#include <optional>
#include <vector>

namespace fathom::isoflop {

struct LeastSquares {
  std::vector<double> coefficients;  // one a column
  std::vector<double> residuals;     // y - X b, one a row
  double sum_of_squares = 0;         // of the residuals
};

/// min |X b - y|^2; `x` has a row a point. Nothing when the columns are not independent (to 1e-10 of their
/// length) or there are fewer rows than columns.
std::optional<LeastSquares> least_squares(const std::vector<std::vector<double>>& x,
                                          const std::vector<double>& y);

/// The same with b >= 0: the best of the solutions with some coefficients at zero. For at most 6 columns.
std::optional<LeastSquares> nonnegative_least_squares(const std::vector<std::vector<double>>& x,
                                                      const std::vector<double>& y);

}  // namespace fathom::isoflop
