#include "train/isoflop/fit.h"

#include <algorithm>
#include <cmath>
#include <map>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/scalar.h"
#include "train/isoflop/bootstrap.h"
#include "train/isoflop/least_squares.h"

namespace fathom::isoflop {
namespace {

double size_of(const Row& r, SizeAxis axis) {
  const std::int64_t n = axis == SizeAxis::Active ? r.params_active : r.params_total;
  return static_cast<double>(n - r.params_embedding);
}

struct Measure {
  const char* name;
  std::optional<double> Row::*value;
};
constexpr Measure kMeasures[] = {
    {"val_loss", &Row::val_loss}, {"val_causal", &Row::val_causal}, {"val_topk", &Row::val_topk}};

// The table's families, in its order, without the searches.
std::vector<std::string> families_of(std::span<const Row> rows) {
  std::vector<std::string> names;
  for (const Row& r : rows) {
    if (r.role != "search" && std::find(names.begin(), names.end(), r.family) == names.end())
      names.push_back(r.family);
  }
  return names;
}

std::string why_left_out(const Row& r) {
  if (r.passes > r.max_passes)
    return fmt::format("{:.1f} passes over the text, more than {}", r.passes, print_number(r.max_passes));
  if (const double off = r.flops / r.budget - 1; std::abs(off) > kFlopsTolerance)
    return fmt::format("its FLOPs are {:+.1f} % off the budget", 100 * off);
  const std::optional<double> loss = r.judged();
  if (r.passes > 1 && loss && r.best_val && *loss > (1 + kOverfitRise) * *r.best_val)
    return fmt::format("overfitted: its loss ended {:.1f} % above its lowest",
                       100 * (*loss / *r.best_val - 1));
  return "";
}

bool judged_by(const Row& r, const char* measure) {
  const std::string name = measure;
  return name == (r.val_loss ? "val_loss" : r.val_causal ? "val_causal" : "val_topk");
}

std::vector<CurvePoint> fitted_points(const Curve& c) {
  std::vector<CurvePoint> points;
  for (const CurveCell& cell : c.cells) {
    if (cell.left_out.empty()) points.push_back({std::log10(cell.n), cell.loss});
  }
  return points;
}

// Mean losses of the fitted sizes, ascending in size.
std::vector<CurvePoint> mean_by_size(const std::vector<CurvePoint>& points) {
  std::map<double, std::pair<double, int>> sums;
  for (const CurvePoint& p : points) {
    sums[p.x].first += p.y;
    sums[p.x].second += 1;
  }
  std::vector<CurvePoint> means;
  means.reserve(sums.size());
  for (const auto& [x, sum] : sums) means.push_back({x, sum.first / sum.second});
  return means;
}

void find_minimum(Curve& c) {
  const std::vector<CurvePoint> points = fitted_points(c);
  if (points.empty()) {
    c.flags.emplace_back("no cell can be fitted");
    return;
  }
  const std::vector<CurvePoint> means = mean_by_size(points);
  c.low = means.front().x;
  c.high = means.back().x;
  c.parabola = fit_parabola(points);
  const auto best = std::min_element(means.begin(), means.end(),
                                     [](const CurvePoint& a, const CurvePoint& b) { return a.y < b.y; });
  Minimum m;
  if (!c.parabola) {
    c.flags.emplace_back("fewer than three sizes, so no parabola: the best cell stands for the minimum");
    m.n.value = std::pow(10, best->x);
    m.loss.value = best->y;
    c.minimum = m;
    return;
  }
  const CurvePoint bottom = lowest_within(*c.parabola, c.low, c.high);
  m.n.value = std::pow(10, bottom.x);
  m.loss.value = bottom.y;
  m.usable = true;
  const auto flag = [&](const std::string& text) {
    c.flags.push_back(text);
    m.usable = false;
  };
  if (!c.parabola->opens_upwards()) {
    flag("the parabola opens downwards: the sizes do not bracket a minimum");
  } else if (const double x = c.parabola->minimum(); x <= c.low || x >= c.high) {
    flag(fmt::format("the minimum is at the grid's edge: {} sizes are needed",
                     x <= c.low ? "smaller" : "larger"));
  } else if (best == means.begin() || best + 1 == means.end()) {
    flag(fmt::format("the best cell is at the grid's edge: {} sizes are needed",
                     best == means.begin() ? "smaller" : "larger"));
  }
  c.minimum = m;
}

std::vector<Curve> curves_of(std::span<const Row> rows, SizeAxis axis) {
  std::vector<Curve> curves;
  for (const std::string& family : families_of(rows)) {
    for (const Measure& measure : kMeasures) {
      std::map<double, Curve> by_budget;
      for (std::size_t i = 0; i < rows.size(); ++i) {
        const Row& r = rows[i];
        if (r.family != family || r.role == "search" || !r.done() || !(r.*measure.value)) continue;
        Curve& c = by_budget[r.budget];
        c.family = family;
        c.kind = r.kind;
        c.measure = measure.name;
        c.judged = judged_by(r, measure.name);
        c.budget = r.budget;
        c.cells.push_back(
            {.row = i, .n = size_of(r, axis), .loss = *(r.*measure.value), .left_out = why_left_out(r)});
      }
      for (auto& [budget, curve] : by_budget) {
        std::stable_sort(curve.cells.begin(), curve.cells.end(),
                         [](const CurveCell& a, const CurveCell& b) { return a.n < b.n; });
        find_minimum(curve);
        curves.push_back(std::move(curve));
      }
    }
  }
  return curves;
}

// Each curve's parabola through what it could have been as well.
void bootstrap_curves(Fit& fit) {
  std::map<bool, ResidualPool> pools;  // of the losses that are judged, and of the others
  for (const Curve& c : fit.curves) {
    if (c.parabola) pools[c.judged].add(c.parabola->residuals, 3);
  }
  fit.noise = pools[true].deviation();
  fit.noise_freedom = pools[true].freedom();
  SplitMix64 random(fit.options.seed);
  for (std::int64_t r = 0; r < fit.options.replicates; ++r) {
    std::vector<std::optional<Parabola>> replicate;
    for (const Curve& c : fit.curves) {
      const ResidualPool& pool = pools[c.judged];
      if (!c.parabola || pool.empty()) {
        replicate.emplace_back();
        continue;
      }
      const double widening = pool.widening(fit.options.level);
      std::vector<CurvePoint> points = fitted_points(c);
      for (CurvePoint& p : points) p.y = c.parabola->at(p.x) + widening * pool.draw(random);
      replicate.push_back(fit_parabola(points));
    }
    fit.replicates.push_back(std::move(replicate));
  }
}

void fill_minimum_intervals(Fit& fit) {
  for (std::size_t i = 0; i < fit.curves.size(); ++i) {
    Curve& c = fit.curves[i];
    if (!c.minimum || !c.parabola) continue;
    std::vector<double> n, loss;
    for (const auto& replicate : fit.replicates) {
      if (!replicate[i]) continue;
      const CurvePoint bottom = lowest_within(*replicate[i], c.low, c.high);
      n.push_back(std::pow(10, bottom.x));
      loss.push_back(bottom.y);
    }
    c.minimum->n.interval = interval_of(std::move(n), fit.options.level);
    c.minimum->loss.interval = interval_of(std::move(loss), fit.options.level);
  }
}

std::optional<double> slope(const std::vector<CurvePoint>& points) {
  std::vector<std::vector<double>> rows;
  std::vector<double> y;
  for (const CurvePoint& p : points) {
    rows.push_back({1, p.x - points.front().x});
    y.push_back(p.y);
  }
  const std::optional<LeastSquares> fit = least_squares(rows, y);
  return fit ? std::optional(fit->coefficients[1]) : std::nullopt;
}

struct Exponents {
  double n = 0, loss = 0;
};

// Through the minima of `curves` (indices of usable ones), with the parabolas that `parabola_of` gives.
template <typename ParabolaOf>
std::optional<Exponents> exponents(const Fit& fit, const std::vector<std::size_t>& curves,
                                   const ParabolaOf& parabola_of) {
  std::vector<CurvePoint> n, loss;
  for (const std::size_t i : curves) {
    const Curve& c = fit.curves[i];
    const std::optional<Parabola>& p = parabola_of(i);
    if (!p) return std::nullopt;
    const CurvePoint bottom = lowest_within(*p, c.low, c.high);
    n.push_back({std::log10(c.budget), bottom.x});
    if (bottom.y <= 0) return std::nullopt;  // a replicate of more noise than loss
    loss.push_back({std::log10(c.budget), std::log10(bottom.y)});
  }
  const std::optional<double> a = slope(n), b = slope(loss);
  if (!a || !b) return std::nullopt;
  return Exponents{*a, -*b};
}

void fit_power_laws(Fit& fit) {
  std::map<std::pair<std::string, std::string>, std::vector<std::size_t>> groups;
  std::vector<std::pair<std::string, std::string>> order;
  for (std::size_t i = 0; i < fit.curves.size(); ++i) {
    const Curve& c = fit.curves[i];
    if (!c.minimum || !c.minimum->usable) continue;
    auto& group = groups[{c.family, c.measure}];
    if (group.empty()) order.emplace_back(c.family, c.measure);
    group.push_back(i);
  }
  for (const auto& key : order) {
    const std::vector<std::size_t>& curves = groups[key];
    if (curves.size() < 2) continue;
    const auto own = [&](std::size_t i) -> const std::optional<Parabola>& { return fit.curves[i].parabola; };
    const std::optional<Exponents> value = exponents(fit, curves, own);
    if (!value) continue;
    std::vector<double> n, loss;
    for (const auto& replicate : fit.replicates) {
      const auto one = [&](std::size_t i) -> const std::optional<Parabola>& { return replicate[i]; };
      if (const std::optional<Exponents> e = exponents(fit, curves, one)) {
        n.push_back(e->n);
        loss.push_back(e->loss);
      }
    }
    fit.power_laws.push_back(
        {.family = key.first,
         .measure = key.second,
         .budgets = static_cast<std::int64_t>(curves.size()),
         .n_exponent = {value->n, interval_of(std::move(n), fit.options.level)},
         .loss_exponent = {value->loss, interval_of(std::move(loss), fit.options.level)}});
  }
}

}  // namespace

const char* name_of(SizeAxis axis) { return axis == SizeAxis::Active ? "active" : "total"; }

std::optional<Interval> interval_of(std::vector<double> values, double level) {
  constexpr std::size_t kEnough = 20;
  if (values.size() < kEnough) return std::nullopt;
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    const double position = share * static_cast<double>(values.size() - 1);
    const auto below = static_cast<std::size_t>(position);
    const double rest = position - static_cast<double>(below);
    return rest > 0 ? values[below] + rest * (values[below + 1] - values[below]) : values[below];
  };
  return Interval{at(0.5 * (1 - level)), at(0.5 * (1 + level))};
}

const Curve* Fit::find(std::string_view family, std::string_view measure, double budget) const {
  for (const Curve& c : curves) {
    if (c.family == family && c.measure == measure && c.budget == budget) return &c;
  }
  return nullptr;
}

Fit fit_rows(std::span<const Row> rows, const FitOptions& options) {
  Fit fit;
  fit.options = options;
  fit.curves = curves_of(rows, options.size);
  if (fit.curves.empty())
    throw UserError("no cell of the grid is done, so there is nothing to fit.",
                    "fathom isoflop status shows how far the sweep is.");
  bootstrap_curves(fit);
  fill_minimum_intervals(fit);
  fit_power_laws(fit);
  if (options.surfaces) fit_surfaces(fit, rows);
  return fit;
}

}  // namespace fathom::isoflop
