#include "train/isoflop/report_figures.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <set>

#include <fmt/format.h>

#include "src/config/scalar.h"
#include "src/core/units.h"
#include "train/isoflop/compare.h"
#include "train/report/svg_chart.h"

namespace fathom::isoflop {
namespace {

using report::Axis;
using report::LineChart;
using report::Marks;
using report::Point;
using report::Scale;
using report::Series;
using report::Stroke;

constexpr int kCurvePoints = 60;
const Point kGap{std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::quiet_NaN()};

Axis size_axis(const Fit& fit) {
  return {
      .label = fmt::format("{} parameters without the embedding table, millions", name_of(fit.options.size)),
      .scale = Scale::Log,
      .unit = 1e6};
}
Axis loss_axis() { return {.label = "validation loss, nats a token"}; }
Axis flops_axis() { return {.label = "training FLOPs", .scale = Scale::Log}; }

std::set<double> budgets_of(const Fit& fit) {
  std::set<double> budgets;
  for (const Curve& c : fit.curves) budgets.insert(c.budget);
  return budgets;
}

// Points that are not joined.
Series dots(const std::string& name, int colour, Marks marks, const std::vector<Point>& points) {
  Series s{.name = name, .colour = colour, .marks = marks, .points = {}};
  for (const Point& p : points) {
    s.points.push_back(p);
    s.points.push_back(kGap);
  }
  return s;
}

void add_curve(const Curve& c, int colour, LineChart& chart) {
  std::vector<Point> fitted, drawn;
  for (const CurveCell& cell : c.cells)
    (cell.left_out.empty() ? fitted : drawn).push_back({cell.n, cell.loss});
  chart.series.push_back(dots(c.family, colour, Marks::Filled, fitted));
  if (!drawn.empty()) chart.series.push_back(dots(c.family + ", not fitted", colour, Marks::Hollow, drawn));
  if (!c.parabola) return;
  Series line{.name = "", .colour = colour, .points = {}};
  for (int i = 0; i <= kCurvePoints; ++i) {
    const double x = c.low + (c.high - c.low) * i / kCurvePoints;
    line.points.push_back({std::pow(10, x), c.parabola->at(x)});
  }
  chart.series.push_back(std::move(line));
  if (!c.minimum) return;
  chart.series.push_back({.name = "",
                          .colour = colour,
                          .stroke = Stroke::Dashed,
                          .marks = Marks::Hollow,
                          .points = {{c.minimum->n.value, c.minimum->loss.value}}});
}

std::string note_of(const Fit& fit, double budget) {
  std::string note;
  for (const Curve& c : fit.curves) {
    if (c.budget != budget || !c.judged) continue;
    for (const std::string& flag : c.flags)
      note += fmt::format("{}{}: {}", note.empty() ? "" : "; ", c.family, flag);
  }
  return note;
}

// A line a family through its judged minima, and faint lines through the ends of their intervals.
std::string against_budget(const Fit& fit, std::span<const Row> rows, const std::string& title, const Axis& y,
                           const std::function<const Estimate&(const Minimum&)>& of) {
  LineChart chart{.title = title, .note = "", .x = flops_axis(), .y = y, .series = {}};
  for (const auto& [family, colour] : colours_of(rows)) {
    Series line{.name = family, .colour = colour, .marks = Marks::Filled, .points = {}};
    Series low{.name = "", .colour = colour, .stroke = Stroke::Dashed, .points = {}};
    Series high = low;
    for (const Curve& c : fit.curves) {
      if (c.family != family || !c.judged || !c.minimum) continue;
      const Estimate& e = of(*c.minimum);
      line.points.push_back({c.budget, e.value});
      if (!e.interval) continue;
      low.points.push_back({c.budget, e.interval->low});
      high.points.push_back({c.budget, e.interval->high});
    }
    if (line.points.empty()) continue;
    chart.series.push_back(std::move(line));
    if (low.points.empty()) continue;
    chart.series.push_back(std::move(low));
    chart.series.push_back(std::move(high));
  }
  chart.note = fmt::format("Dashed: the {} intervals. Minima at a grid's edge are bounds, not minima.",
                           format_percent(fit.options.level));
  return render(chart);
}

// The points that no other one undercuts at lower or equal cost.
std::vector<Point> lower_envelope(std::vector<Point> points) {
  std::sort(points.begin(), points.end(),
            [](const Point& a, const Point& b) { return a.x != b.x ? a.x < b.x : a.y < b.y; });
  std::vector<Point> out;
  for (const Point& p : points) {
    if (out.empty() || p.y < out.back().y) out.push_back(p);
  }
  return out;
}

using Value = std::function<std::optional<double>(const Row&)>;

std::string frontier(std::span<const Row> rows, const std::string& title, const std::string& note,
                     const Axis& x, const Value& of) {
  LineChart chart{.title = title, .note = note, .x = x, .y = loss_axis(), .series = {}};
  for (const auto& [family, colour] : colours_of(rows)) {
    std::vector<Point> points;
    for (const Row& r : rows) {
      const std::optional<double> value =
          r.done() && r.family == family && r.role != "search" ? of(r) : std::nullopt;
      if (value && r.judged()) points.push_back({*value, *r.judged()});
    }
    if (points.empty()) continue;
    chart.series.push_back({.name = family, .colour = colour, .points = lower_envelope(points)});
    chart.series.push_back(dots("", colour, Marks::Hollow, points));
  }
  return render(chart);
}

std::string by_size(const Fit& fit, std::span<const Row> rows, const std::string& title,
                    const std::string& note, const Axis& y, const Value& of) {
  LineChart chart{.title = title, .note = note, .x = size_axis(fit), .y = y, .series = {}};
  for (const auto& [family, colour] : colours_of(rows)) {
    std::vector<Point> points;
    for (const Curve& c : fit.curves) {
      if (c.family != family || !c.judged) continue;
      for (const CurveCell& cell : c.cells) {
        const std::optional<double> value = of(rows[cell.row]);
        if (value) points.push_back({cell.n, *value});
      }
    }
    if (!points.empty()) chart.series.push_back(dots(family, colour, Marks::Filled, points));
  }
  return render(chart);
}

}  // namespace

std::map<std::string, int> colours_of(std::span<const Row> rows) {
  std::map<std::string, int> colours;
  for (const Row& r : rows) {
    if (!colours.contains(r.family)) colours.emplace(r.family, static_cast<int>(colours.size()));
  }
  return colours;
}

std::string isoflop_figures(const Fit& fit, std::span<const Row> rows) {
  std::string out;
  const std::map<std::string, int> colours = colours_of(rows);
  for (const double budget : budgets_of(fit)) {
    LineChart chart{.title = fmt::format("{} training FLOPs", print_number(budget)),
                    .note = note_of(fit, budget),
                    .x = size_axis(fit),
                    .y = loss_axis(),
                    .series = {}};
    for (const Curve& c : fit.curves) {
      if (c.budget == budget && c.judged) add_curve(c, colours.at(c.family), chart);
    }
    out += render(chart);
  }
  return out;
}

std::string minima_figures(const Fit& fit, std::span<const Row> rows) {
  return against_budget(fit, rows, "Best size against budget", size_axis(fit),
                        [](const Minimum& m) -> const Estimate& { return m.n; }) +
         against_budget(fit, rows, "Loss at the best size against budget", loss_axis(),
                        [](const Minimum& m) -> const Estimate& { return m.loss; });
}

std::string frontier_figures(const Fit&, std::span<const Row> rows) {
  std::set<std::string> devices;
  for (const Row& r : rows) {
    if (r.done()) devices.insert(r.device);
  }
  const std::string clock_note =
      devices.size() > 1 ? "The cells ran on different devices, so their times do not compare."
                         : "Seconds of training on " + (devices.empty() ? "" : *devices.begin()) +
                               ", without evaluations; workers that share a machine slow each other down.";
  return frontier(rows, "Frontier against training FLOPs",
                  "The line joins what no cell of the family undercuts.", flops_axis(),
                  [](const Row& r) { return std::optional(r.flops); }) +
         frontier(rows, "Frontier against wall-clock", clock_note,
                  {.label = "seconds of training", .scale = Scale::Log},
                  [](const Row& r) { return r.seconds; });
}

std::string cost_figures(const Fit& fit, std::span<const Row> rows) {
  return by_size(fit, rows, "Time of a step",
                 "The median over a cell's logged steps, of the kind of device that most cells ran on.",
                 {.label = "seconds a step", .scale = Scale::Log}, comparable_steps(rows)) +
         by_size(fit, rows, "Passes over the training text", "Cells above the sweep's limit are not fitted.",
                 {.label = "passes", .scale = Scale::Log},
                 [](const Row& r) { return r.passes > 0 ? std::optional(r.passes) : std::nullopt; });
}

}  // namespace fathom::isoflop
