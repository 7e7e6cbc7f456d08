// What results decide: a family's learning rate, once its search is through, and which sizes get further
// seeds, once a curve's first seeds are through. A decision is recorded and never taken again, so a failed
// cell that is tried again later does not change the configs of cells that have begun.
#include <algorithm>
#include <cmath>
#include <set>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "src/config/scalar.h"
#include "src/io/atomic_file.h"
#include "train/isoflop/sweep_folder.h"

namespace fathom::isoflop {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

fs::path lr_path(const SweepFolder& folder, const std::string& family) {
  return folder.path() / "decisions" / fmt::format("lr-{}.json", family);
}

fs::path near_path(const SweepFolder& folder, const std::string& family, double budget) {
  return folder.path() / "decisions" / fmt::format("near-{}-{}.json", family, print_number(budget));
}

std::optional<Json> read_json(const fs::path& path) {
  std::error_code error;
  if (!fs::exists(path, error)) return std::nullopt;
  Json j = Json::parse(read_file(path.string(), "decision"), nullptr, false);
  if (!j.is_object()) throw UserError(path.string() + " is not a JSON object.", "Remove it to decide again.");
  return j;
}

// The first worker's decision stands.
void record(const SweepFolder& folder, const fs::path& path, const Json& decision) {
  const Claim turn = Claim::wait_for(folder.claim("sweep"));
  std::error_code error;
  if (!fs::exists(path, error)) write_file(path.string(), decision.dump() + "\n");
}

double loss_of(const Row& row) {
  const double loss = row.done() ? row.judged().value_or(INFINITY) : INFINITY;
  return std::isfinite(loss) ? loss : INFINITY;
}

// The result of each cell, or nothing when one of them has not ended.
std::optional<std::vector<Row>> all_ended(const SweepFolder& folder, const std::vector<const Cell*>& cells) {
  std::vector<Row> rows;
  for (const Cell* cell : cells) {
    std::optional<Row> row = folder.read_result(cell->id);
    if (!row) return std::nullopt;
    rows.push_back(std::move(*row));
  }
  return rows;
}

// Nothing as well when every rate failed: the family's cells then wait for --retry-failed.
std::optional<double> best_rate(const SweepFolder& folder, const std::vector<Cell>& cells, const Family& f) {
  std::vector<const Cell*> tried;
  for (const Cell& c : cells) {
    if (c.role == Role::Search && c.family == f.name) tried.push_back(&c);
  }
  const auto rows = all_ended(folder, tried);
  if (!rows) return std::nullopt;
  std::optional<double> best;
  double lowest = INFINITY;
  for (std::size_t i = 0; i < rows->size(); ++i) {
    if (loss_of((*rows)[i]) >= lowest) continue;
    lowest = loss_of((*rows)[i]);
    best = tried[i]->lr;
  }
  return best;
}

struct SizedLoss {
  double size = 0;  // active parameters
  double loss = 0;  // mean over the seeds
  Shape shape;
};

// The best size of the curve and its neighbours; nothing while a first seed is missing.
std::optional<std::vector<Shape>> beside_minimum(const Sweep& sweep, const SweepFolder& folder,
                                                 const std::vector<Cell>& cells, const Family& f,
                                                 double budget) {
  std::vector<SizedLoss> curve;
  for (const Shape& shape : sweep.shapes_of(f, budget)) {
    std::vector<const Cell*> seeds;
    for (const Cell& c : cells) {
      if (c.role == Role::Grid && c.family == f.name && c.budget == budget && c.shape == shape)
        seeds.push_back(&c);
    }
    const auto rows = all_ended(folder, seeds);
    if (!rows || rows->empty()) return std::nullopt;
    double sum = 0;
    for (const Row& row : *rows) sum += loss_of(row);
    if (std::isfinite(sum))
      curve.push_back({static_cast<double>(rows->front().params_active - rows->front().params_embedding),
                       sum / static_cast<double>(rows->size()), shape});
  }
  std::sort(curve.begin(), curve.end(), [](const auto& a, const auto& b) { return a.size < b.size; });
  const auto best = std::min_element(curve.begin(), curve.end(),
                                     [](const auto& a, const auto& b) { return a.loss < b.loss; });
  std::vector<Shape> shapes;
  for (auto it = curve.begin(); it != curve.end(); ++it) {
    if (std::abs(it - best) <= sweep.neighbours) shapes.push_back(it->shape);
  }
  return shapes;
}

}  // namespace

Decisions SweepFolder::decisions(const Sweep& sweep) const {
  Decisions decided;
  for (const Family& f : sweep.families) {
    if (searches(sweep, f)) {
      if (const auto j = read_json(lr_path(*this, f.name))) decided.lr[f.name] = j->value("lr", 0.0);
    }
    if (sweep.seeds_near_minimum.empty()) continue;
    for (const double budget : sweep.budgets_of(f)) {
      const auto j = read_json(near_path(*this, f.name, budget));
      if (!j) continue;
      std::vector<Shape>& shapes = decided.near[{f.name, budget}];
      for (const std::string& name : j->value("shapes", std::vector<std::string>{})) {
        const auto shape = read_shape(name);
        const std::vector<Shape>& grid = sweep.shapes_of(f, budget);
        if (shape && std::find(grid.begin(), grid.end(), *shape) != grid.end()) shapes.push_back(*shape);
      }
    }
  }
  return decided;
}

Decisions SweepFolder::decide(const Sweep& sweep) const {
  Decisions decided = decisions(sweep);
  const std::vector<Cell> cells = cells_of(sweep, decided);
  for (const Family& f : sweep.families) {
    if (searches(sweep, f) && !decided.lr.contains(f.name)) {
      if (const auto lr = best_rate(*this, cells, f)) {
        record(*this, lr_path(*this, f.name), {{"family", f.name}, {"lr", *lr}});
      }
    }
    if (sweep.seeds_near_minimum.empty()) continue;
    for (const double budget : sweep.budgets_of(f)) {
      if (decided.near.contains({f.name, budget})) continue;
      const auto shapes = beside_minimum(sweep, *this, cells, f, budget);
      if (!shapes) continue;
      std::vector<std::string> names;
      for (const Shape& s : *shapes) names.push_back(s.name());
      record(*this, near_path(*this, f.name, budget),
             {{"family", f.name}, {"budget", budget}, {"shapes", names}});
    }
  }
  return decisions(sweep);
}

}  // namespace fathom::isoflop
