// The residual bootstrap behind every interval of the fits.
//
// A replicate gives each fitted cell the loss  L_fit(N) + e,  e drawn with replacement from the residuals of
// all curves of one measure, each curve's multiplied by sqrt(n / (n - 3)) for the three unknowns that its
// parabola has used up, and all by the ratio of Student's t to the normal quantile for the degrees of freedom
// in the pool, which are few. Cells of further seeds are cells like others, so their spread is in the pool;
// to resample seeds as well would count it twice. The noise is taken to be the same for all cells of a
// measure.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/core/splitmix64.h"

namespace fathom::isoflop {

class ResidualPool {
 public:
  /// `unknowns` were fitted to these residuals.
  void add(std::span<const double> residuals, std::int64_t unknowns);

  /// Whether anything is known about the noise.
  bool empty() const { return freedom_ <= 0; }
  std::int64_t freedom() const { return freedom_; }
  /// Standard deviation of the noise.
  double deviation() const;
  /// Student's t over the normal quantile, for two-sided intervals of `level`.
  double widening(double level) const;
  /// One draw, without the widening.
  double draw(SplitMix64& random) const { return scaled_[random.below(scaled_.size())]; }

 private:
  std::vector<double> scaled_;
  double sum_of_squares_ = 0;
  std::int64_t freedom_ = 0;
};

}  // namespace fathom::isoflop
