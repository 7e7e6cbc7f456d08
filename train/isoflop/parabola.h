// One isoFLOP curve: loss against log10 of the model's size at one budget, as a parabola
//   L(x) = c0 + c1 (x - x0) + c2 (x - x0)^2,   x = log10 N,   x0 = the mean of x,
// whose minimum is the size that the budget is best spent on (Hoffmann et al. 2022, approach 2).
#pragma once

#include <optional>
#include <span>
#include <vector>

namespace fathom::isoflop {

struct CurvePoint {
  double x = 0;  // log10 N
  double y = 0;  // loss, nats a token
};

struct Parabola {
  double x0 = 0;
  double c0 = 0, c1 = 0, c2 = 0;
  std::vector<double> residuals;  // in the points' order

  double at(double x) const { return c0 + (c1 + c2 * (x - x0)) * (x - x0); }
  bool opens_upwards() const { return c2 > 0; }
  /// Where the minimum is; it means nothing when the parabola opens downwards.
  double minimum() const { return x0 - c1 / (2 * c2); }
};

/// Nothing with fewer than three different sizes. Three sizes of one seed each are met exactly.
std::optional<Parabola> fit_parabola(std::span<const CurvePoint> points);

/// The lowest point of the parabola within [low, high]: its minimum if that lies there, else the lower end.
CurvePoint lowest_within(const Parabola& p, double low, double high);

/// The smaller size at which the parabola has the loss `y`, within [low, high]; nothing where it does not
/// come down to it.
std::optional<double> first_at(const Parabola& p, double y, double low, double high);

}  // namespace fathom::isoflop
