// How far a sweep is.
#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "src/core/units.h"
#include "train/isoflop/plan.h"
#include "train/metrics/metrics_log.h"

namespace fathom::isoflop {
namespace {

using Json = nlohmann::ordered_json;

std::int64_t count_of(std::span<const Row> rows, std::string_view status) {
  return std::count_if(rows.begin(), rows.end(), [&](const Row& r) { return r.status == status; });
}

// Steps that a cell's run has logged; 0: none yet.
std::int64_t steps_done(const SweepFolder& folder, const Row& row) {
  const std::filesystem::path path = folder.run(row.cell) / "metrics.jsonl";
  std::error_code error;
  if (!std::filesystem::exists(path, error)) return 0;
  const Metrics m = read_metrics(path);
  return m.steps.empty() ? 0 : m.steps.back().step;
}

struct Remaining {
  std::optional<double> seconds;  // with as many workers as run now, at least one
  std::int64_t workers = 0;
};

Remaining remaining(const SweepFolder& folder, std::span<const Row> rows) {
  const Rates rates(rows);
  std::set<std::string> owners;
  std::optional<double> work = 0.0;
  for (const Row& r : rows) {
    if (r.done() || r.status == "failed") continue;
    if (r.status == "running") owners.insert(r.reason);
    const std::optional<double> rate = rates.of(r.family);
    const std::int64_t left = r.steps - std::min(r.steps, steps_done(folder, r));
    const double flops = r.steps > 0 ? r.flops * static_cast<double>(left) / static_cast<double>(r.steps) : 0;
    work = work && rate ? std::optional(*work + flops / *rate) : std::nullopt;
  }
  Remaining out;
  out.workers = static_cast<std::int64_t>(owners.size());
  if (work) out.seconds = *work / static_cast<double>(std::max<std::int64_t>(1, out.workers));
  return out;
}

}  // namespace

std::string status_text(const Sweep& sweep, const SweepFolder& folder, std::span<const Row> rows,
                        const Decisions& decided) {
  std::string text;
  const auto out = std::back_inserter(text);
  std::size_t widest = 4;
  for (const Row& r : rows) widest = std::max(widest, r.cell.size());
  fmt::format_to(out, "{:<{}}  {:<8} {:>12} {:>9} {:>9}  {}\n", "cell", widest, "status", "step", "loss",
                 "time", "");
  for (const Row& r : rows) {
    const std::int64_t step = r.done() ? r.steps : steps_done(folder, r);
    const std::optional<double> loss = r.judged();
    fmt::format_to(out, "{:<{}}  {:<8} {:>12} {:>9} {:>9}  {}\n", r.cell, widest, r.status,
                   fmt::format("{}/{}", step, r.steps), loss ? fmt::format("{:.4f}", *loss) : "-",
                   r.seconds ? format_duration(*r.seconds) : "-", r.reason);
  }
  fmt::format_to(out, "\n{}: {} done, {} failed, {} running, {} to do", sweep.name, count_of(rows, "done"),
                 count_of(rows, "failed"), count_of(rows, "running"), count_of(rows, "todo"));
  if (const std::int64_t more = undecided_near_cells(sweep, decided); more > 0)
    fmt::format_to(out, ", at most {} further seeds to be decided", more);
  text += ".\n";
  const Remaining left = remaining(folder, rows);
  if (count_of(rows, "todo") + count_of(rows, "running") > 0) {
    if (left.seconds) {
      fmt::format_to(out, "The rest takes about {} on {} worker{}.\n", format_duration(*left.seconds),
                     std::max<std::int64_t>(1, left.workers), left.workers > 1 ? "s" : "");
    } else {
      text += "The rest takes an unknown time: no cell is done yet.\n";
    }
  }
  return text;
}

std::string status_json(const Sweep& sweep, const SweepFolder& folder, std::span<const Row> rows,
                        const Decisions& decided) {
  const Remaining left = remaining(folder, rows);
  Json cells = Json::array();
  for (const Row& r : rows) {
    Json cell = Json::parse(to_json(r));
    cell["steps_done"] = r.done() ? r.steps : steps_done(folder, r);
    cells.push_back(std::move(cell));
  }
  return Json{{"sweep", sweep.name},
              {"done", count_of(rows, "done")},
              {"failed", count_of(rows, "failed")},
              {"running", count_of(rows, "running")},
              {"todo", count_of(rows, "todo")},
              {"undecided", undecided_near_cells(sweep, decided)},
              {"workers", left.workers},
              {"eta_seconds", left.seconds ? Json(*left.seconds) : Json(nullptr)},
              {"cells", std::move(cells)}}
      .dump();
}

}  // namespace fathom::isoflop
