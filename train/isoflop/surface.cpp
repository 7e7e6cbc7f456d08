#include "train/isoflop/surface.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "train/isoflop/least_squares.h"

namespace fathom::isoflop {
namespace {

constexpr double kLowest = 0.01, kHighest = 3;
constexpr int kFirstSteps = 24;  // of the first grid over the logarithms of both exponents
constexpr int kSteps = 4;        // of the later ones
constexpr int kRounds = 200;
constexpr double kPrecise = 1e-6;

// A grid around the best point so far. It narrows where that point lies within, and moves where it does not:
// the valley of such fits is long and curved.
struct Search {
  double alpha, beta, half;

  void move_to(double a, double b, int steps) {
    const bool within = std::max(std::abs(a - alpha), std::abs(b - beta)) < 0.99 * half;
    alpha = a;
    beta = b;
    if (within) half *= std::max(2.0 / steps, 0.5);
  }
};

struct Problem {
  std::vector<double> log_n, log_d, loss;  // logarithms less their means: the columns stay near 1
  double mean_n = 0, mean_d = 0;
};

Problem scaled(std::span<const SurfacePoint> points) {
  Problem p;
  for (const SurfacePoint& q : points) {
    p.log_n.push_back(std::log(q.n));
    p.log_d.push_back(std::log(q.d));
    p.loss.push_back(q.loss);
    p.mean_n += p.log_n.back() / static_cast<double>(points.size());
    p.mean_d += p.log_d.back() / static_cast<double>(points.size());
  }
  for (double& x : p.log_n) x -= p.mean_n;
  for (double& x : p.log_d) x -= p.mean_d;
  return p;
}

std::optional<LeastSquares> project(const Problem& p, double alpha, double beta) {
  std::vector<std::vector<double>> rows;
  for (std::size_t i = 0; i < p.loss.size(); ++i)
    rows.push_back({1, std::exp(-alpha * p.log_n[i]), std::exp(-beta * p.log_d[i])});
  std::optional<LeastSquares> free = least_squares(rows, p.loss);
  if (free && std::ranges::all_of(free->coefficients, [](double b) { return b >= 0; })) return free;
  return nonnegative_least_squares(rows, p.loss);
}

}  // namespace

double Surface::at(double n, double d) const { return e + a * std::pow(n, -alpha) + b * std::pow(d, -beta); }

std::optional<Surface> fit_surface(std::span<const SurfacePoint> points, const Surface* start) {
  std::set<double> sizes, tokens;
  for (const SurfacePoint& p : points) {
    sizes.insert(p.n);
    tokens.insert(p.d);
  }
  if (points.size() < 6 || sizes.size() < 3 || tokens.size() < 3) return std::nullopt;
  const Problem p = scaled(points);
  const double low = std::log(kLowest), high = std::log(kHighest);
  Search search{start ? std::log(start->alpha) : 0.5 * (low + high),
                start ? std::log(start->beta) : 0.5 * (low + high), start ? 0.5 : 0.5 * (high - low)};
  std::optional<LeastSquares> best;
  for (int round = 0; round < kRounds && search.half > kPrecise; ++round) {
    const int steps = round == 0 && !start ? kFirstSteps : kSteps;
    double best_alpha = search.alpha, best_beta = search.beta;
    for (int i = 0; i <= steps; ++i) {
      for (int j = 0; j <= steps; ++j) {
        const double la = std::clamp(search.alpha + search.half * (2.0 * i / steps - 1), low, high);
        const double lb = std::clamp(search.beta + search.half * (2.0 * j / steps - 1), low, high);
        std::optional<LeastSquares> fit = project(p, std::exp(la), std::exp(lb));
        if (!fit || (best && fit->sum_of_squares >= best->sum_of_squares)) continue;
        best = std::move(fit);
        best_alpha = la;
        best_beta = lb;
      }
    }
    search.move_to(best_alpha, best_beta, steps);
  }
  if (!best) return std::nullopt;
  Surface s;
  s.alpha = std::exp(search.alpha);
  s.beta = std::exp(search.beta);
  s.e = best->coefficients[0];
  s.a = best->coefficients[1] * std::exp(s.alpha * p.mean_n);
  s.b = best->coefficients[2] * std::exp(s.beta * p.mean_d);
  s.rms = std::sqrt(best->sum_of_squares / static_cast<double>(points.size()));
  const auto limit = [&](double x) { return x < low + 1e-3 || x > high - 1e-3; };
  s.at_limit = limit(search.alpha) || limit(search.beta) || s.a == 0 || s.b == 0;
  return s;
}

}  // namespace fathom::isoflop
