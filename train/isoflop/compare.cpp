#include "train/isoflop/compare.h"

#include <algorithm>
#include <cmath>
#include <map>

namespace fathom::isoflop {

CurvePoint Sample::lowest(std::size_t curve) const {
  const Curve& c = fit_.curves[curve];
  return lowest_within((*this)[curve], c.low, c.high);
}

Compared compare(const Fit& fit, std::span<const std::size_t> curves, const Figure& figure) {
  const auto complete = [&](const Sample& s) {
    return std::all_of(curves.begin(), curves.end(), [&](std::size_t c) { return s.has(c); });
  };
  Compared out;
  const Sample own(fit);
  out.estimate.value = complete(own) ? figure(own).value_or(NAN) : NAN;
  std::vector<double> values;
  for (const auto& replicate : fit.replicates) {
    const Sample sample(fit, replicate);
    if (!complete(sample)) continue;
    ++out.replicates;
    const std::optional<double> value = figure(sample);
    if (!value || !std::isfinite(*value)) continue;
    ++out.defined;
    values.push_back(*value);
  }
  out.estimate.interval = interval_of(std::move(values), fit.options.level);
  return out;
}

std::optional<double> along(const Curve& curve, std::span<const Row> rows, double x,
                            const std::function<std::optional<double>(const Row&)>& of) {
  std::map<double, std::pair<double, int>> sums;  // by log10 N: the logarithms' sum
  for (const CurveCell& cell : curve.cells) {
    if (!cell.left_out.empty()) continue;
    const std::optional<double> value = of(rows[cell.row]);
    if (!value || *value <= 0) continue;
    auto& [sum, count] = sums[std::log10(cell.n)];
    sum += std::log(*value);
    ++count;
  }
  if (sums.empty()) return std::nullopt;
  const auto mean = [](const auto& entry) { return entry.second.first / entry.second.second; };
  const auto after = sums.lower_bound(x);
  if (after == sums.begin()) return std::exp(mean(*after));
  if (after == sums.end()) return std::exp(mean(*std::prev(after)));
  const auto before = std::prev(after);
  const double share = (x - before->first) / (after->first - before->first);
  return std::exp(mean(*before) + share * (mean(*after) - mean(*before)));
}

std::function<std::optional<double>(const Row&)> comparable_steps(std::span<const Row> rows) {
  std::map<std::string, std::int64_t> cells;
  for (const Row& r : rows) {
    if (r.done()) ++cells[r.device];
  }
  const auto most = std::max_element(cells.begin(), cells.end(),
                                     [](const auto& a, const auto& b) { return a.second < b.second; });
  return [device = most == cells.end() ? std::string() : most->first](const Row& r) {
    return r.device == device ? r.step_seconds : std::nullopt;
  };
}

}  // namespace fathom::isoflop
