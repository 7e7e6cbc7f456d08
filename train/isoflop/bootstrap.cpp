#include "train/isoflop/bootstrap.h"

#include <cmath>

namespace fathom::isoflop {
namespace {

// The normal quantile for p in (0.5, 1), by bisection of erfc.
double normal_quantile(double p) {
  double low = 0, high = 10;
  for (int i = 0; i < 80; ++i) {
    const double middle = 0.5 * (low + high);
    (1 - 0.5 * std::erfc(middle / std::sqrt(2.0)) < p ? low : high) = middle;
  }
  return low;
}

// P(T <= t) for Student's t with `freedom` degrees, t >= 0 (Abramowitz and Stegun 26.7.3 and 26.7.4).
double student_cdf(double t, std::int64_t freedom) {
  const double theta = std::atan(t / std::sqrt(static_cast<double>(freedom)));
  const double cos2 = std::cos(theta) * std::cos(theta);
  double term = freedom % 2 == 1 ? std::cos(theta) : 1.0;
  double sum = freedom == 1 ? 0.0 : term;
  for (std::int64_t k = freedom % 2 == 1 ? 3 : 2; k < freedom - 1; k += 2) {
    term *= cos2 * static_cast<double>(k - 1) / static_cast<double>(k);
    sum += term;
  }
  const double pi = std::acos(-1.0);
  const double inner = freedom % 2 == 1 ? 2 / pi * (theta + std::sin(theta) * sum) : std::sin(theta) * sum;
  return 0.5 + 0.5 * inner;
}

double student_quantile(double p, std::int64_t freedom) {
  double low = 0, high = 1e6;
  for (int i = 0; i < 200; ++i) {
    const double middle = 0.5 * (low + high);
    (student_cdf(middle, freedom) < p ? low : high) = middle;
  }
  return low;
}

}  // namespace

void ResidualPool::add(std::span<const double> residuals, std::int64_t unknowns) {
  const auto n = static_cast<std::int64_t>(residuals.size());
  if (n <= unknowns) return;
  const double scale = std::sqrt(static_cast<double>(n) / static_cast<double>(n - unknowns));
  for (const double r : residuals) {
    scaled_.push_back(scale * r);
    sum_of_squares_ += r * r;
  }
  freedom_ += n - unknowns;
}

double ResidualPool::deviation() const {
  return empty() ? 0 : std::sqrt(sum_of_squares_ / static_cast<double>(freedom_));
}

double ResidualPool::widening(double level) const {
  constexpr std::int64_t kMany = 200;  // beyond it the two quantiles are equal to half a percent
  if (empty() || freedom_ > kMany) return 1;
  const double p = 0.5 * (1 + level);
  return student_quantile(p, freedom_) / normal_quantile(p);
}

}  // namespace fathom::isoflop
