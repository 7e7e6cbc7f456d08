#include "train/isoflop/parabola.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "train/isoflop/least_squares.h"

namespace fathom::isoflop {

std::optional<Parabola> fit_parabola(std::span<const CurvePoint> points) {
  std::set<double> sizes;
  double sum = 0;
  for (const CurvePoint& p : points) {
    sizes.insert(p.x);
    sum += p.x;
  }
  if (sizes.size() < 3) return std::nullopt;
  Parabola out;
  out.x0 = sum / static_cast<double>(points.size());
  std::vector<std::vector<double>> rows;
  std::vector<double> y;
  for (const CurvePoint& p : points) {
    const double t = p.x - out.x0;
    rows.push_back({1, t, t * t});
    y.push_back(p.y);
  }
  const std::optional<LeastSquares> fit = least_squares(rows, y);
  if (!fit) return std::nullopt;
  out.c0 = fit->coefficients[0];
  out.c1 = fit->coefficients[1];
  out.c2 = fit->coefficients[2];
  out.residuals = fit->residuals;
  return out;
}

CurvePoint lowest_within(const Parabola& p, double low, double high) {
  double x = p.at(low) <= p.at(high) ? low : high;
  if (p.opens_upwards()) x = std::clamp(p.minimum(), low, high);
  return {x, p.at(x)};
}

std::optional<double> first_at(const Parabola& p, double y, double low, double high) {
  if (p.at(low) <= y) return low;
  const CurvePoint bottom = lowest_within(p, low, high);
  if (bottom.y > y) return std::nullopt;
  // It falls from `low` to the bottom and crosses y once between them.
  double left = low, right = bottom.x;
  for (int i = 0; i < 100; ++i) {
    const double middle = 0.5 * (left + right);
    (p.at(middle) > y ? left : right) = middle;
  }
  return right;
}

}  // namespace fathom::isoflop
