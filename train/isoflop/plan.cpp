// The plan's refusals, sums and tables.
#include "train/isoflop/plan.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "src/config/scalar.h"
#include "src/core/units.h"

namespace fathom::isoflop {
namespace {

using Json = nlohmann::ordered_json;

// Of a checkpoint: the parameters and Adam's two moments, in fp32.
constexpr double kCheckpointBytes = 12;

double d(std::int64_t x) { return static_cast<double>(x); }

std::optional<double> seconds_of(const Row& row, const Rates& rates) {
  if (row.done() && row.seconds) return row.seconds;
  const std::optional<double> rate = rates.of(row.family);
  return rate ? std::optional(row.flops / *rate) : std::nullopt;
}

}  // namespace

void require_few_passes(const Sweep& sweep, std::span<const Row> rows) {
  if (sweep.allow_repeats || rows.empty()) return;
  const Row& worst = *std::max_element(rows.begin(), rows.end(),
                                       [](const Row& a, const Row& b) { return a.passes < b.passes; });
  if (worst.passes <= sweep.max_passes) return;
  const auto count =
      std::count_if(rows.begin(), rows.end(), [&](const Row& r) { return r.passes > sweep.max_passes; });
  throw UsageError(
      fmt::format(
          "{}: {} of {} cells pass over the training text more than {} times; the worst, {}, makes {:.1f} "
          "passes over {} tokens. Repeated text is worth less than fresh text, and models that overfit "
          "tell nothing about their family.",
          sweep.file.string(), count, rows.size(), print_number(sweep.max_passes), worst.cell, worst.passes,
          with_commas(worst.store_tokens)),
      fmt::format("Use at least {} tokens, larger models or smaller budgets; or set allow_repeats: true, and "
                  "these cells are drawn and never fitted.",
                  with_commas(std::llround(std::ceil(d(worst.tokens) / sweep.max_passes)))));
}

Rates::Rates(std::span<const Row> rows, double given) {
  struct Sum {
    double flops = 0, seconds = 0;
  };
  std::map<std::string, Sum> sums;
  Sum all;
  for (const Row& row : rows) {
    if (!row.done() || row.seconds.value_or(0) <= 0) continue;
    for (Sum* sum : {&sums[row.family], &all}) {
      sum->flops += row.flops;
      sum->seconds += *row.seconds;
    }
  }
  for (const auto& [family, sum] : sums) by_family_[family] = sum.flops / sum.seconds;
  if (all.seconds > 0) overall_ = all.flops / all.seconds;
  if (given > 0) {
    by_family_.clear();
    overall_ = given;
  }
}

std::optional<double> Rates::of(const std::string& family) const {
  const auto found = by_family_.find(family);
  return found != by_family_.end() ? std::optional(found->second) : overall_;
}

PlanSummary summarise(const Sweep& sweep, std::span<const Row> rows, const Rates& rates,
                      const Decisions& decided) {
  PlanSummary s;
  s.cells = static_cast<std::int64_t>(rows.size());
  s.more_near = undecided_near_cells(sweep, decided);
  s.seconds = 0.0;
  for (const Row& row : rows) {
    s.flops += row.flops;
    const std::optional<double> seconds = seconds_of(row, rates);
    s.seconds = s.seconds && seconds ? std::optional(*s.seconds + *seconds) : std::nullopt;
    if (sweep.keep_models) {
      const std::int64_t kept = std::min(sweep.base.train.keep_checkpoints, sweep.checkpoints);
      s.checkpoint_bytes += kCheckpointBytes * d(row.params_total) * d(kept);
    }
  }
  return s;
}

std::string plan_text(const Sweep& sweep, std::span<const Row> rows, const Rates& rates,
                      const PlanSummary& summary, const DataSize& data) {
  std::string text;
  const auto out = std::back_inserter(text);
  fmt::format_to(out, "{}: {} budgets, {} families, {} tokens of training text, {} ids\n\n", sweep.name,
                 sweep.budgets.size(), sweep.families.size(), with_commas(data.tokens), data.vocab);
  std::size_t widest = 4;
  for (const Row& r : rows) widest = std::max(widest, r.cell.size());
  fmt::format_to(out, "{:<{}}  {:>8} {:>8} {:>10} {:>7} {:>8} {:>8} {:>7} {:>9} {:>12}\n", "cell", widest,
                 "params", "active", "FLOPs", "off", "steps", "tokens", "passes", "lr", "time");
  for (const Row& r : rows) {
    const std::optional<double> seconds = seconds_of(r, rates);
    fmt::format_to(out, "{:<{}}  {:>8} {:>8} {:>10.4g} {:>6.2f}% {:>8} {:>8} {:>7.2f} {:>9} {:>12}{}\n",
                   r.cell, widest, format_count(d(r.params_total)), format_count(d(r.params_active)), r.flops,
                   100 * (r.flops / r.budget - 1), r.steps, format_count(d(r.tokens)), r.passes,
                   r.lr ? fmt::format("{:.3g}", *r.lr) : "searched",
                   seconds ? format_duration(*seconds) : "-",
                   r.passes > r.max_passes ? "  drawn, not fitted" : "");
  }
  fmt::format_to(out, "\n{} cells, {:.4g} FLOPs", summary.cells, summary.flops);
  if (summary.more_near > 0) {
    fmt::format_to(out, "; at most {} more cells of further seeds, which the results decide",
                   summary.more_near);
  }
  text += ".\n";
  if (summary.seconds) {
    fmt::format_to(out, "Time on one worker: {}.\n", format_duration(*summary.seconds));
  } else {
    text += "Time: unknown; give --flops-per-second, or run a cell and plan again.\n";
  }
  if (summary.checkpoint_bytes > 0) {
    fmt::format_to(out, "Checkpoints in the end: {} (keep_models: false keeps none).\n",
                   format_bytes(summary.checkpoint_bytes));
  }
  const auto off = std::count_if(rows.begin(), rows.end(), [](const Row& r) {
    return std::abs(r.flops / r.budget - 1) > kFlopsTolerance;
  });
  if (off > 0) {
    fmt::format_to(out,
                   "{} cells spend more than {} of their budget too much or too little, because their steps "
                   "are few: they are drawn, not fitted. A smaller train.batch_tokens helps.\n",
                   off, format_percent(kFlopsTolerance));
  }
  return text;
}

std::string plan_json(const Sweep& sweep, std::span<const Row> rows, const Rates& rates,
                      const PlanSummary& summary, const DataSize& data) {
  Json cells = Json::array();
  for (const Row& r : rows) {
    Json cell = Json::parse(to_json(r));
    const std::optional<double> seconds = seconds_of(r, rates);
    cell["estimated_seconds"] = seconds ? Json(*seconds) : Json(nullptr);
    cells.push_back(std::move(cell));
  }
  return Json{{"sweep", sweep.name},
              {"data_tokens", data.tokens},
              {"vocab", data.vocab},
              {"max_passes", sweep.max_passes},
              {"allow_repeats", sweep.allow_repeats},
              {"cells_total", summary.cells},
              {"cells_undecided", summary.more_near},
              {"flops_total", summary.flops},
              {"seconds", summary.seconds ? Json(*summary.seconds) : Json(nullptr)},
              {"checkpoint_bytes", summary.checkpoint_bytes},
              {"cells", std::move(cells)}}
      .dump();
}

}  // namespace fathom::isoflop
