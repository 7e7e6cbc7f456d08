#include "train/isoflop/least_squares.h"

#include <cmath>
#include <cstddef>

namespace fathom::isoflop {
namespace {

using Matrix = std::vector<std::vector<double>>;  // rows

double column_norm(const Matrix& a, std::size_t column, std::size_t from) {
  double sum = 0;
  for (std::size_t i = from; i < a.size(); ++i) sum += a[i][column] * a[i][column];
  return std::sqrt(sum);
}

// Reflects rows `from`.. of the columns right of it, and of y, so that column `from` is zero below its first.
void reflect(Matrix& a, std::vector<double>& y, std::size_t from, double norm) {
  const double alpha = a[from][from] > 0 ? -norm : norm;
  std::vector<double> v;
  for (std::size_t i = from; i < a.size(); ++i) v.push_back(a[i][from]);
  v[0] -= alpha;
  double vv = 0;
  for (const double t : v) vv += t * t;
  if (vv == 0) return;
  const auto apply = [&](auto at) {
    double dot = 0;
    for (std::size_t i = 0; i < v.size(); ++i) dot += v[i] * at(from + i);
    for (std::size_t i = 0; i < v.size(); ++i) at(from + i) -= 2 * dot / vv * v[i];
  };
  for (std::size_t c = from; c < a[0].size(); ++c) apply([&](std::size_t i) -> double& { return a[i][c]; });
  apply([&](std::size_t i) -> double& { return y[i]; });
}

void fill_residuals(const Matrix& x, const std::vector<double>& y, LeastSquares& fit) {
  fit.residuals.clear();
  fit.sum_of_squares = 0;
  for (std::size_t i = 0; i < x.size(); ++i) {
    double r = y[i];
    for (std::size_t c = 0; c < x[i].size(); ++c) r -= x[i][c] * fit.coefficients[c];
    fit.residuals.push_back(r);
    fit.sum_of_squares += r * r;
  }
}

}  // namespace

std::optional<LeastSquares> least_squares(const Matrix& x, const std::vector<double>& y) {
  constexpr double kIndependent = 1e-10;
  if (x.empty() || x.size() < x[0].size()) return std::nullopt;
  Matrix a = x;
  std::vector<double> b = y;
  const std::size_t columns = x[0].size();
  for (std::size_t c = 0; c < columns; ++c) {
    const double norm = column_norm(a, c, c);
    if (norm <= kIndependent * column_norm(x, c, 0) || !std::isfinite(norm)) return std::nullopt;
    reflect(a, b, c, norm);
  }
  LeastSquares fit;
  fit.coefficients.assign(columns, 0);
  for (std::size_t c = columns; c-- > 0;) {
    double sum = b[c];
    for (std::size_t k = c + 1; k < columns; ++k) sum -= a[c][k] * fit.coefficients[k];
    fit.coefficients[c] = sum / a[c][c];
  }
  fill_residuals(x, y, fit);
  return fit;
}

std::optional<LeastSquares> nonnegative_least_squares(const Matrix& x, const std::vector<double>& y) {
  if (x.empty()) return std::nullopt;
  const std::size_t columns = x[0].size();
  std::optional<LeastSquares> best;
  for (unsigned subset = 1; subset < (1U << columns); ++subset) {
    Matrix part(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
      for (std::size_t c = 0; c < columns; ++c) {
        if ((subset >> c & 1U) != 0) part[i].push_back(x[i][c]);
      }
    }
    std::optional<LeastSquares> fit = least_squares(part, y);
    if (!fit) continue;
    LeastSquares whole = *fit;
    whole.coefficients.assign(columns, 0);
    bool feasible = true;
    for (std::size_t c = 0, k = 0; c < columns; ++c) {
      if ((subset >> c & 1U) == 0) continue;
      whole.coefficients[c] = fit->coefficients[k++];
      feasible = feasible && whole.coefficients[c] >= 0;
    }
    if (feasible && (!best || whole.sum_of_squares < best->sum_of_squares)) best = std::move(whole);
  }
  return best;
}

}  // namespace fathom::isoflop
