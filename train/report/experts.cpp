// Experts: how they shared the tokens in training, and what the causal rule makes of it.
#include <algorithm>
#include <cmath>
#include <functional>
#include <optional>

#include <fmt/format.h>

#include "train/report/html.h"
#include "train/report/sections.h"
#include "train/report/svg_chart.h"

namespace fathom::report {
namespace {

using Runs = std::span<const RunData>;

const StepRecord* last_step(const RunData& run) {
  const auto& steps = run.metrics.steps;
  const auto it =
      std::find_if(steps.rbegin(), steps.rend(), [](const StepRecord& r) { return !r.experts.empty(); });
  return it == steps.rend() ? nullptr : &*it;
}

// The last evaluation that saw experts decide causally.
const EvalRecord* last_eval(const RunData& run) {
  const auto& evals = run.metrics.evals;
  const auto it = std::find_if(evals.rbegin(), evals.rend(),
                               [](const EvalRecord& e) { return !e.expert_capacity.empty(); });
  return it == evals.rend() ? nullptr : &*it;
}

bool has_experts(const RunData& run) { return last_step(run) != nullptr || last_eval(run) != nullptr; }

using OfLayer = double ExpertStats::*;

double mean_over_layers(const StepRecord& r, OfLayer figure) {
  if (r.experts.empty()) return std::nan("");
  double sum = 0.0;
  for (const ExpertStats& e : r.experts) sum += e.*figure;
  return sum / static_cast<double>(r.experts.size());
}

std::vector<Point> training_curve(const RunData& run, OfLayer figure) {
  std::vector<double> y;
  for (const StepRecord& r : run.metrics.steps) y.push_back(mean_over_layers(r, figure));
  y = smooth(y, std::max<std::size_t>(1, y.size() / 40));
  std::vector<Point> points;
  for (std::size_t i = 0; i < y.size(); ++i)
    points.push_back({static_cast<double>(run.metrics.steps[i].step), y[i]});
  return points;
}

bool ever_above_zero(const std::vector<Point>& points) {
  return std::any_of(points.begin(), points.end(), [](const Point& p) { return p.y > 0.0; });
}

std::string shares_in_training(Runs runs) {
  LineChart c;
  c.title = "Tokens without an expert, in training";
  c.x = {.label = "step"};
  c.y = {.label = "percent, mean over layers", .unit = 0.01};
  c.note = "Solid: tokens that no expert took; they skip the MLP. Dashed: choices that found no room.";
  for (std::size_t i = 0; i < runs.size(); ++i) {
    if (last_step(runs[i]) == nullptr) continue;
    const int colour = static_cast<int>(i);
    c.series.push_back({runs[i].name + ", no expert", colour, Stroke::Solid, Marks::None,
                        training_curve(runs[i], &ExpertStats::uncovered)});
    const auto dropped = training_curve(runs[i], &ExpertStats::dropped);
    if (ever_above_zero(dropped))
      c.series.push_back({runs[i].name + ", dropped", colour, Stroke::Dashed, Marks::None, dropped});
  }
  return render(c);
}

std::string noops_in_training(Runs runs) {
  LineChart c;
  c.title = "No-ops in training";
  c.x = {.label = "step"};
  c.y = {.label = "percent, mean over layers", .unit = 0.01};
  c.note =
      "Solid: tokens whose largest affinity is a no-op's. Dashed: a token's affinity for all no-ops "
      "together.";
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const auto affinity = training_curve(runs[i], &ExpertStats::noop_affinity);
    if (!ever_above_zero(affinity)) continue;
    const int colour = static_cast<int>(i);
    c.series.push_back({runs[i].name + ", no-op", colour, Stroke::Solid, Marks::None,
                        training_curve(runs[i], &ExpertStats::noop_share)});
    c.series.push_back({runs[i].name + ", affinity", colour, Stroke::Dashed, Marks::None, affinity});
  }
  return c.series.empty() ? "" : render(c);
}

// Of tokens that choose: experts that choose all have the same load.
std::string loads_in_training(Runs runs) {
  LineChart c;
  c.title = "Busiest and idlest expert, in training";
  c.x = {.label = "step"};
  c.y = {.label = "tokens, 1 being an even share"};
  c.note = "Means over layers.";
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const auto busiest = training_curve(runs[i], &ExpertStats::load_max),
               idlest = training_curve(runs[i], &ExpertStats::load_min);
    bool differ = false;
    for (std::size_t j = 0; j < busiest.size(); ++j) differ |= busiest[j].y > idlest[j].y + 1e-6;
    if (!differ) continue;
    const int colour = static_cast<int>(i);
    c.series.push_back({runs[i].name + ", busiest", colour, Stroke::Solid, Marks::None, busiest});
    c.series.push_back({runs[i].name + ", idlest", colour, Stroke::Dashed, Marks::None, idlest});
  }
  return c.series.empty() ? "" : render(c);
}

std::string causal_loads(Runs runs) {
  BarChart c;
  c.title = "Experts under the causal rule, last evaluation";
  c.category = "layer";
  c.y_label = "share of the block's tokens";
  c.note = "Bars: what the busiest expert of the layer takes. Short line: what the idlest takes.";
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const EvalRecord* eval = last_eval(runs[i]);
    if (eval == nullptr) continue;
    BarSeries s{.name = runs[i].name, .colour = static_cast<int>(i), .bars = {}, .ticks = {}};
    for (std::size_t l = 0; l < std::min(eval->expert_layers.size(), eval->expert_capacity.size()); ++l) {
      const std::vector<double>& taken = eval->expert_capacity[l];
      if (taken.empty()) continue;
      const auto [least, most] = std::minmax_element(taken.begin(), taken.end());
      s.bars.emplace_back(eval->expert_layers[l], *most);
      s.ticks.emplace_back(eval->expert_layers[l], *least);
    }
    c.series.push_back(std::move(s));
  }
  return c.series.empty() ? "" : render(c);
}

std::string decisions(Runs runs) {
  LineChart c;
  c.title = "Causal decisions of experts against top-k";
  c.x = {.label = "step"};
  c.y = {.label = "percent of an expert's tokens", .unit = 0.01};
  c.note =
      "Recall: of the tokens that an expert takes of a sequence, those it takes causally. Precision: of "
      "those taken "
      "causally, those of top-k.";
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const int colour = static_cast<int>(i);
    Series recall{runs[i].name + ", recall", colour, Stroke::Solid, Marks::Filled, {}};
    Series precision{runs[i].name + ", precision", colour, Stroke::Dashed, Marks::Hollow, {}};
    for (const EvalRecord& e : runs[i].metrics.evals) {
      if (!e.expert_recall || !e.expert_precision) continue;
      recall.points.push_back({static_cast<double>(e.step), *e.expert_recall});
      precision.points.push_back({static_cast<double>(e.step), *e.expert_precision});
    }
    if (recall.points.empty()) continue;
    c.series.push_back(std::move(recall));
    c.series.push_back(std::move(precision));
  }
  return c.series.empty() ? "" : render(c);
}

// Empty for a run without experts.
std::string table_of(const RunData& run) {
  const StepRecord* step = last_step(run);
  const EvalRecord* eval = last_eval(run);
  if (step == nullptr && eval == nullptr) return "";
  const std::vector<std::int64_t>& layers = step != nullptr ? step->expert_layers : eval->expert_layers;
  const auto percent = [](double share) { return fmt::format("{:.2f} %", 100.0 * share); };
  const auto number = [](double value) { return fmt::format("{:.3f}", value); };
  Table t;
  t.head = {"Layer",          "no expert",     "experts a token", "dropped",       "busiest", "idlest",
            "no-op affinity", "no-op largest", "entropy, nats",   "causal shares", "recall",  "precision"};
  for (std::size_t i = 0; i < layers.size(); ++i) {
    std::vector<std::string> row{std::to_string(layers[i])};
    if (step != nullptr && i < step->experts.size()) {
      const ExpertStats& e = step->experts[i];
      row.insert(row.end(),
                 {percent(e.uncovered), number(e.per_token), percent(e.dropped), number(e.load_max),
                  number(e.load_min), number(e.noop_affinity), percent(e.noop_share), number(e.entropy)});
    } else {
      row.insert(row.end(), 8, "–");
    }
    if (eval != nullptr && i < eval->expert_capacity.size() && !eval->expert_capacity[i].empty()) {
      const std::vector<double>& taken = eval->expert_capacity[i];
      const auto [least, most] = std::minmax_element(taken.begin(), taken.end());
      row.push_back(percent(*least) + " to " + percent(*most));
    } else {
      row.emplace_back("–");
    }
    for (const auto* by_layer : {eval == nullptr ? nullptr : &eval->expert_recall_by_layer,
                                 eval == nullptr ? nullptr : &eval->expert_precision_by_layer}) {
      row.push_back(by_layer != nullptr && i < by_layer->size() ? percent((*by_layer)[i]) : "–");
    }
    t.rows.push_back(std::move(row));
  }
  return "<details><summary>Experts by layer: " + escape(run.name) + "</summary>\n" + render(t) +
         "</details>\n";
}

}  // namespace

std::string experts_section(Runs runs) {
  if (std::none_of(runs.begin(), runs.end(), has_experts)) return "";
  std::string out = "<h2>Experts</h2>\n<div class=\"charts\">\n" + shares_in_training(runs) +
                    loads_in_training(runs) + noops_in_training(runs) + decisions(runs) + causal_loads(runs) +
                    "</div>\n<div style=\"height:16px\"></div>\n";
  for (const RunData& run : runs) out += table_of(run);
  return out;
}

}  // namespace fathom::report
