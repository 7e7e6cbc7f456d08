// Figures that compare two curves, with intervals from the fit's replicates.
#pragma once

#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "train/isoflop/fit.h"

namespace fathom::isoflop {

/// The parabolas of one replicate, or those of the fit itself, by curve.
class Sample {
 public:
  explicit Sample(const Fit& fit) : fit_(fit), replicate_(nullptr) {}
  Sample(const Fit& fit, const std::vector<std::optional<Parabola>>& replicate)
      : fit_(fit), replicate_(&replicate) {}

  /// Whether the curve has a parabola here.
  bool has(std::size_t curve) const { return parabola(curve).has_value(); }
  const Parabola& operator[](std::size_t curve) const { return *parabola(curve); }
  /// Its lowest point within the fitted sizes.
  CurvePoint lowest(std::size_t curve) const;

 private:
  const std::optional<Parabola>& parabola(std::size_t curve) const {
    return replicate_ != nullptr ? (*replicate_)[curve] : fit_.curves[curve].parabola;
  }

  const Fit& fit_;
  const std::vector<std::optional<Parabola>>* replicate_;
};

/// A figure of a sample; nothing where it is not defined.
using Figure = std::function<std::optional<double>(const Sample&)>;

struct Compared {
  Estimate estimate;            // value NaN where the fit itself does not define the figure
  std::int64_t replicates = 0;  // that have all the curves
  std::int64_t defined = 0;     // of them, those that define the figure
};

/// The figure of the fit and its interval over the replicates, which must have parabolas for `curves`.
Compared compare(const Fit& fit, std::span<const std::size_t> curves, const Figure& figure);

/// step_seconds of the cells that ran on the kind of device that most cells ran on; nothing of the others,
/// whose times do not compare with theirs.
std::function<std::optional<double>(const Row&)> comparable_steps(std::span<const Row> rows);

/// A quantity of a curve's cells at log10 N = x: between the sizes its logarithm is interpolated linearly,
/// beyond them the last one stands. `of` gives it for a row; cells that lack it are passed over.
std::optional<double> along(const Curve& curve, std::span<const Row> rows, double x,
                            const std::function<std::optional<double>(const Row&)>& of);

}  // namespace fathom::isoflop
