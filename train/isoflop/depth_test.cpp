#include "train/isoflop/depth_test.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "train/isoflop/bootstrap.h"
#include "train/isoflop/least_squares.h"

namespace fathom::isoflop {
namespace {

constexpr double kNearSize = 1.2;
constexpr double kOtherAspect = 1.5;

struct Cell {
  std::size_t curve;  // counted from 0 over the family's
  double x, aspect, loss;
};

std::vector<Cell> cells_of(const Fit& fit, std::span<const Row> rows, const std::string& family,
                           std::size_t& curves) {
  std::vector<Cell> cells;
  for (const Curve& c : fit.curves) {
    if (c.family != family || !c.judged || !c.parabola) continue;
    for (const CurveCell& cell : c.cells) {
      const Row& r = rows[cell.row];
      if (cell.left_out.empty())
        cells.push_back({curves, std::log10(cell.n) - c.parabola->x0,
                         std::log10(static_cast<double>(r.depth) / static_cast<double>(r.width)), cell.loss});
    }
    ++curves;
  }
  return cells;
}

bool comparable(const std::vector<Cell>& cells) {
  return std::any_of(cells.begin(), cells.end(), [&](const Cell& a) {
    return std::any_of(cells.begin(), cells.end(), [&](const Cell& b) {
      return a.curve == b.curve && std::abs(a.x - b.x) <= std::log10(kNearSize) &&
             std::abs(a.aspect - b.aspect) >= std::log10(kOtherAspect);
    });
  });
}

}  // namespace

DepthTest test_depth(const Fit& fit, std::span<const Row> rows, const std::string& family) {
  DepthTest out;
  out.effect.value = NAN;
  std::size_t curves = 0;
  const std::vector<Cell> cells = cells_of(fit, rows, family, curves);
  if (!comparable(cells)) {
    out.why = "no two fitted cells of one budget are of near size and differ in depth over width";
    return out;
  }
  std::vector<std::vector<double>> x;
  std::vector<double> y;
  for (const Cell& c : cells) {
    std::vector<double> row(3 * curves + 1, 0);
    row[3 * c.curve] = 1;
    row[3 * c.curve + 1] = c.x;
    row[3 * c.curve + 2] = c.x * c.x;
    row.back() = c.aspect;
    x.push_back(std::move(row));
    y.push_back(c.loss);
  }
  const std::optional<LeastSquares> fitted = least_squares(x, y);
  if (!fitted) {
    out.why = "the cells do not tell size and shape apart";
    return out;
  }
  out.effect.value = fitted->coefficients.back();
  ResidualPool pool;
  pool.add(fitted->residuals, static_cast<std::int64_t>(3 * curves + 1));
  if (pool.empty()) return out;
  SplitMix64 random(fit.options.seed);
  const double widening = pool.widening(fit.options.level);
  std::vector<double> effects;
  for (std::int64_t r = 0; r < fit.options.replicates; ++r) {
    std::vector<double> other = y;
    for (std::size_t i = 0; i < y.size(); ++i)
      other[i] = y[i] - fitted->residuals[i] + widening * pool.draw(random);
    if (const auto again = least_squares(x, other)) effects.push_back(again->coefficients.back());
  }
  out.effect.interval = interval_of(std::move(effects), fit.options.level);
  return out;
}

}  // namespace fathom::isoflop
