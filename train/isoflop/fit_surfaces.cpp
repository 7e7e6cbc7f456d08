// The surfaces L(N, D) of a table's families, with their intervals.
#include <cmath>
#include <utility>
#include <vector>

#include "train/isoflop/bootstrap.h"
#include "train/isoflop/fit.h"

namespace fathom::isoflop {
namespace {

constexpr std::int64_t kUnknowns = 5;
constexpr std::int64_t kMostReplicates = 300;  // each is a search of its own

std::vector<SurfacePoint> points_of(const Fit& fit, std::span<const Row> rows, const std::string& family,
                                    const std::string& measure) {
  std::vector<SurfacePoint> points;
  for (const Curve& c : fit.curves) {
    if (c.family != family || c.measure != measure) continue;
    for (const CurveCell& cell : c.cells) {
      if (cell.left_out.empty())
        points.push_back({cell.n, static_cast<double>(rows[cell.row].tokens), cell.loss});
    }
  }
  return points;
}

void fill_intervals(const Fit& fit, const std::vector<SurfacePoint>& points, SurfaceFit& out) {
  std::vector<double> residuals;
  residuals.reserve(points.size());
  for (const SurfacePoint& p : points) residuals.push_back(p.loss - out.surface.at(p.n, p.d));
  ResidualPool pool;
  pool.add(residuals, kUnknowns);
  if (pool.empty()) return;
  const double widening = pool.widening(fit.options.level);
  SplitMix64 random(fit.options.seed);
  std::vector<double> e, alpha, beta, n_exponent, loss_exponent;
  for (std::int64_t r = 0; r < std::min(fit.options.replicates, kMostReplicates); ++r) {
    std::vector<SurfacePoint> other = points;
    for (SurfacePoint& p : other) p.loss = out.surface.at(p.n, p.d) + widening * pool.draw(random);
    const std::optional<Surface> s = fit_surface(other, &out.surface);
    if (!s) continue;
    e.push_back(s->e);
    alpha.push_back(s->alpha);
    beta.push_back(s->beta);
    n_exponent.push_back(s->size_exponent());
    loss_exponent.push_back(s->loss_exponent());
  }
  const double level = fit.options.level;
  out.e.interval = interval_of(std::move(e), level);
  out.alpha.interval = interval_of(std::move(alpha), level);
  out.beta.interval = interval_of(std::move(beta), level);
  out.n_exponent.interval = interval_of(std::move(n_exponent), level);
  out.loss_exponent.interval = interval_of(std::move(loss_exponent), level);
}

}  // namespace

void fit_surfaces(Fit& fit, std::span<const Row> rows) {
  std::vector<std::pair<std::string, std::string>> groups;
  for (const Curve& c : fit.curves) {
    if (groups.empty() || groups.back() != std::pair(c.family, c.measure))
      groups.emplace_back(c.family, c.measure);
  }
  for (const auto& [family, measure] : groups) {
    const std::vector<SurfacePoint> points = points_of(fit, rows, family, measure);
    const std::optional<Surface> surface = fit_surface(points);
    if (!surface) continue;
    SurfaceFit out;
    out.family = family;
    out.measure = measure;
    out.cells = static_cast<std::int64_t>(points.size());
    out.surface = *surface;
    out.e.value = surface->e;
    out.alpha.value = surface->alpha;
    out.beta.value = surface->beta;
    out.n_exponent.value = surface->size_exponent();
    out.loss_exponent.value = surface->loss_exponent();
    fill_intervals(fit, points, out);
    fit.surfaces.push_back(std::move(out));
  }
}

}  // namespace fathom::isoflop
