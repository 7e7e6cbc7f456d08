// Curves and routing: from records to charts.
#include <algorithm>
#include <cmath>
#include <functional>

#include <fmt/format.h>

#include "src/core/units.h"
#include "train/report/html.h"
#include "train/report/sections.h"
#include "train/report/svg_chart.h"

namespace fathom::report {
namespace {

using Runs = std::span<const RunData>;

struct Unit {
  double size;
  const char* name;
};

Unit flop_unit(double largest) {
  for (const Unit u : {Unit{1e21, "ZFLOP"}, Unit{1e18, "EFLOP"}, Unit{1e15, "PFLOP"}, Unit{1e12, "TFLOP"},
                       Unit{1e9, "GFLOP"}}) {
    if (largest >= u.size) return u;
  }
  return {1e6, "MFLOP"};
}

Unit time_unit(double largest) {
  if (largest >= 2 * 86400.0) return {86400.0, "days"};
  if (largest >= 2 * 3600.0) return {3600.0, "hours"};
  if (largest >= 180.0) return {60.0, "minutes"};
  return {1.0, "seconds"};
}

enum class Against { Flops, Time, Steps };

template <typename Record>
double x_of(const Record& r, Against against) {
  switch (against) {
    case Against::Flops:
      return r.flops;
    case Against::Time:
      return r.seconds;
    case Against::Steps:
      return static_cast<double>(r.step);
  }
  return 0.0;
}

Axis x_axis(Runs runs, Against against) {
  double largest = 0.0;
  for (const RunData& run : runs) {
    if (!run.metrics.steps.empty()) largest = std::max(largest, x_of(run.metrics.steps.back(), against));
    if (!run.metrics.evals.empty()) largest = std::max(largest, x_of(run.metrics.evals.back(), against));
  }
  switch (against) {
    case Against::Flops: {
      const Unit unit = flop_unit(largest);
      return {.label = std::string("training ") + unit.name, .unit = unit.size};
    }
    case Against::Time: {
      const Unit unit = time_unit(largest);
      return {.label = std::string("wall-clock, ") + unit.name, .unit = unit.size};
    }
    case Against::Steps:
      return {.label = "step"};
  }
  return {};
}

const char* words(Against against) {
  switch (against) {
    case Against::Flops:
      return "against training FLOPs";
    case Against::Time:
      return "against wall-clock";
    case Against::Steps:
      return "by step";
  }
  return "";
}

std::vector<Point> points_of(const RunData& run, Against against, const std::vector<double>& y) {
  std::vector<Point> out;
  for (std::size_t i = 0; i < y.size(); ++i) out.push_back({x_of(run.metrics.steps[i], against), y[i]});
  return out;
}

std::vector<double> column(const RunData& run, const std::function<double(const StepRecord&)>& value) {
  std::vector<double> out;
  for (const StepRecord& r : run.metrics.steps) out.push_back(value(r));
  return out;
}

std::size_t window_of(const RunData& run) { return std::max<std::size_t>(1, run.metrics.steps.size() / 40); }

// Where the steep start of the curves leaves the frame, so that the part that is compared fills it.
double upper_limit(Runs runs) {
  double limit = 0.0;
  for (const RunData& run : runs) {
    const std::vector<double> y =
        smooth(column(run, [](const StepRecord& r) { return r.loss; }), window_of(run));
    if (y.size() < 40) return 0.0;
    if (const double v = y[y.size() / 12]; std::isfinite(v)) limit = std::max(limit, v);
  }
  return limit;
}

std::string training_loss(Runs runs, Against against) {
  LineChart c;
  c.title = std::string("Training loss ") + words(against);
  c.x = x_axis(runs, against);
  c.y = {.label = "loss, nats a token", .upper_limit = upper_limit(runs)};
  c.note = "Bold: centred mean over 1/40 of the records. Faint: each record.";
  if (c.y.upper_limit > 0.0) c.note += " The steep start lies above the frame.";
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const std::vector<double> raw = column(runs[i], [](const StepRecord& r) { return r.loss; });
    const int colour = static_cast<int>(i);
    c.series.push_back({runs[i].name, colour, Stroke::Faint, Marks::None, points_of(runs[i], against, raw)});
    c.series.push_back({runs[i].name, colour, Stroke::Solid, Marks::None,
                        points_of(runs[i], against, smooth(raw, window_of(runs[i])))});
  }
  return render(c);
}

std::string validation_loss(Runs runs, Against against) {
  LineChart c;
  c.title = std::string("Validation loss ") + words(against);
  c.x = x_axis(runs, against);
  c.y = {.label = "loss, nats a token"};
  bool routed = false;
  double limit = 0.0;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const int colour = static_cast<int>(i);
    Series served{runs[i].name, colour, Stroke::Solid, Marks::Filled, {}};
    Series topk{runs[i].name + ", top-k", colour, Stroke::Dashed, Marks::Hollow, {}};
    bool has_topk = false, has_causal = false;
    const std::vector<EvalRecord>& evals = runs[i].metrics.evals;
    for (const EvalRecord& e : evals) {
      served.points.push_back({x_of(e, against), e.judged_loss()});
      topk.points.push_back({x_of(e, against), e.val_topk.value_or(std::nan(""))});
      has_topk = has_topk || e.val_topk;
      has_causal = has_causal || e.val_causal;
    }
    if (evals.size() >= 6) limit = std::max(limit, evals[evals.size() / 6].judged_loss());
    routed = routed || has_topk;
    if (has_topk && has_causal) c.series.push_back(std::move(topk));
    if (has_topk) served.name += has_causal ? ", causal" : ", top-k";
    c.series.push_back(std::move(served));
  }
  c.y.upper_limit = limit;
  if (limit > 0.0) c.note = "The steep start lies above the frame. ";
  if (routed)
    c.note +=
        "Causal: the routing that can be served. Top-k: the routing of training, which sees the future.";
  return render(c);
}

enum class Smoothing { None, Mean };

std::string step_chart(Runs runs, const char* title, Axis y, Smoothing smoothing, const char* note,
                       const std::function<double(const StepRecord&)>& value) {
  LineChart c;
  c.title = title;
  c.x = x_axis(runs, Against::Steps);
  c.y = std::move(y);
  c.note = note;
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const std::vector<double> raw = column(runs[i], value);
    const int colour = static_cast<int>(i);
    const bool smoothed = smoothing == Smoothing::Mean;
    if (smoothed) {
      c.series.push_back(
          {runs[i].name, colour, Stroke::Faint, Marks::None, points_of(runs[i], Against::Steps, raw)});
    }
    c.series.push_back(
        {runs[i].name, colour, Stroke::Solid, Marks::None,
         points_of(runs[i], Against::Steps, smoothed ? smooth(raw, window_of(runs[i])) : raw)});
  }
  return render(c);
}

bool is_routed(const RunData& run) { return !run.summary.routed_layers.empty(); }

std::vector<std::pair<std::int64_t, double>> by_layer(const std::vector<std::int64_t>& layers,
                                                      const std::vector<double>& values) {
  std::vector<std::pair<std::int64_t, double>> out;
  for (std::size_t i = 0; i < std::min(layers.size(), values.size()); ++i)
    out.emplace_back(layers[i], values[i]);
  return out;
}

std::string capacity_bars(Runs runs) {
  BarChart c;
  c.title = "Realised capacity by layer, last evaluation";
  c.category = "layer";
  c.y_label = "share of tokens";
  c.note =
      "Bars: tokens that the causal rule sends through the block. Dashed: C, the capacity of training. "
      "Short line: the share routed in training.";
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (!is_routed(runs[i])) continue;
    BarSeries s;
    s.name = runs[i].name;
    s.colour = static_cast<int>(i);
    s.bars = by_layer(runs[i].summary.routed_layers, runs[i].summary.realised_capacity);
    if (!runs[i].metrics.steps.empty()) {
      const StepRecord& last = runs[i].metrics.steps.back();
      s.ticks = by_layer(last.routed_layers, last.routed_fraction);
    }
    s.reference = runs[i].summary.capacity.value_or(0.0);
    c.series.push_back(std::move(s));
  }
  return render(c);
}

std::string decision_chart(Runs runs) {
  LineChart c;
  c.title = "Causal decisions against top-k";
  c.x = x_axis(runs, Against::Steps);
  c.y = {.label = "percent of tokens", .unit = 0.01};
  c.note =
      "Recall: of the tokens that top-k keeps, those kept causally. Precision: of those kept causally, those "
      "that top-k keeps.";
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (!is_routed(runs[i])) continue;
    Series recall{runs[i].name + ", recall", static_cast<int>(i), Stroke::Solid, Marks::Filled, {}};
    Series precision{runs[i].name + ", precision", static_cast<int>(i), Stroke::Dashed, Marks::Hollow, {}};
    for (const EvalRecord& e : runs[i].metrics.evals) {
      recall.points.push_back({static_cast<double>(e.step), e.router_recall.value_or(std::nan(""))});
      precision.points.push_back({static_cast<double>(e.step), e.router_precision.value_or(std::nan(""))});
    }
    c.series.push_back(std::move(recall));
    c.series.push_back(std::move(precision));
  }
  return render(c);
}

double mean_of(const std::vector<double>& values) {
  if (values.empty()) return std::nan("");
  double sum = 0.0;
  for (const double v : values) sum += v;
  return sum / static_cast<double>(values.size());
}

// The share of tokens that a threshold of 0.5 would keep, in training, beside the predictor's accuracy where
// there is one.
std::string above_half_chart(Runs runs) {
  LineChart c;
  c.title = "Routers in training, mean over layers";
  c.x = x_axis(runs, Against::Steps);
  c.y = {.label = "percent of tokens", .unit = 0.01};
  c.note =
      "Tokens whose router says yes by itself, sigma(r) > 0.5, and where present the predictor's accuracy.";
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (!is_routed(runs[i])) continue;
    const auto above = column(runs[i], [](const StepRecord& r) {
      std::vector<double> shares;
      for (const RouterStats& s : r.router) shares.push_back(s.above_half);
      return mean_of(shares);
    });
    const auto accuracy =
        column(runs[i], [](const StepRecord& r) { return r.predictor_accuracy.value_or(std::nan("")); });
    const auto known = [](const std::vector<double>& y) {
      return std::any_of(y.begin(), y.end(), [](double v) { return std::isfinite(v); });
    };
    const int colour = static_cast<int>(i);
    if (known(above))
      c.series.push_back({runs[i].name + ", sigma(r) > 0.5", colour, Stroke::Solid, Marks::None,
                          points_of(runs[i], Against::Steps, above)});
    if (known(accuracy))
      c.series.push_back({runs[i].name + ", predictor accuracy", colour, Stroke::Dashed, Marks::None,
                          points_of(runs[i], Against::Steps, accuracy)});
  }
  return render(c);
}

std::string router_table(const RunData& run) {
  Table t;
  t.head = {"Layer",      "realised capacity", "routed in training", "recall",           "precision",
            "logit mean", "logit min",         "logit max",          "sigma(r) &gt; 0.5"};
  const StepRecord step = run.metrics.steps.empty() ? StepRecord{} : run.metrics.steps.back();
  const EvalRecord eval = run.metrics.evals.empty() ? EvalRecord{} : run.metrics.evals.back();
  const auto percent = [](const std::vector<double>& v, std::size_t i) {
    return i < v.size() ? fmt::format("{:.2f} %", 100.0 * v[i]) : "–";
  };
  for (std::size_t i = 0; i < run.summary.routed_layers.size(); ++i) {
    std::vector<std::string> row{std::to_string(run.summary.routed_layers[i]),
                                 percent(eval.realised_capacity, i), percent(step.routed_fraction, i),
                                 percent(eval.router_recall_by_layer, i),
                                 percent(eval.router_precision_by_layer, i)};
    if (i < step.router.size()) {
      const RouterStats& r = step.router[i];
      for (const double v : {r.mean, r.min, r.max}) row.push_back(fmt::format("{:.3f}", v));
      row.push_back(fmt::format("{:.2f} %", 100.0 * r.above_half));
    } else {
      row.insert(row.end(), 4, "–");
    }
    t.rows.push_back(std::move(row));
  }
  return "<details><summary>Routers by layer: " + escape(run.name) + "</summary>\n" + render(t) +
         "</details>\n";
}

}  // namespace

std::string loss_charts(Runs runs) {
  return "<h2>Loss</h2>\n<div class=\"charts\">\n" + training_loss(runs, Against::Flops) +
         training_loss(runs, Against::Time) + validation_loss(runs, Against::Flops) +
         validation_loss(runs, Against::Time) + "</div>\n";
}

std::string optimizer_charts(Runs runs) {
  return "<h2>Optimization and speed</h2>\n<div class=\"charts\">\n" +
         step_chart(runs, "Learning rate", {.label = "learning rate, 1e-3", .unit = 1e-3}, Smoothing::None,
                    "", [](const StepRecord& r) { return r.lr; }) +
         step_chart(runs, "Gradient norm", {.label = "global norm before clipping", .scale = Scale::Log},
                    Smoothing::Mean, "", [](const StepRecord& r) { return r.grad_norm; }) +
         step_chart(runs, "Throughput", {.label = "thousand tokens a second", .unit = 1e3}, Smoothing::Mean,
                    "", [](const StepRecord& r) { return r.tokens_per_s; }) +
         step_chart(runs, "Compute rate", {.label = "GFLOP/s", .unit = 1e9}, Smoothing::Mean,
                    "Counted FLOPs; a skipped token counts nothing.",
                    [](const StepRecord& r) { return r.flops_per_s; }) +
         "</div>\n";
}

std::string routing_section(Runs runs) {
  if (std::none_of(runs.begin(), runs.end(), is_routed)) return "";
  std::string out = "<h2>Routing</h2>\n<div class=\"charts\">\n" + capacity_bars(runs) +
                    decision_chart(runs) + above_half_chart(runs) +
                    "</div>\n<div style=\"height:16px\"></div>\n";
  for (const RunData& run : runs) {
    if (is_routed(run)) out += router_table(run);
  }
  return out;
}

std::string breakdown_section(Runs runs) {
  std::vector<StackedRow> rows;
  for (const RunData& run : runs) {
    if (run.breakdown.empty()) continue;
    double total = 0.0;
    for (const auto& [term, value] : run.breakdown) total += value;
    rows.push_back({fmt::format("{}: {}", run.name, format_flops(total)), run.breakdown});
  }
  if (rows.empty()) return "";
  return "<h2>Where the FLOPs go</h2>\n<div class=\"charts\">\n" +
         render_stacked("FLOPs by term", "From each run's plan.json; the bars share one scale.", rows) +
         "</div>\n";
}

}  // namespace fathom::report
