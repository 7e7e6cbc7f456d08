#include "train/isoflop/cells.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/apply.h"
#include "src/config/parse.h"
#include "src/config/resolve.h"
#include "src/config/scalar.h"
#include "src/flops/flops.h"

namespace fathom::isoflop {
namespace {

std::string grid_id(const std::string& family, double budget, const Shape& shape, std::int64_t seed) {
  return fmt::format("{}-{}-{}-s{}", family, print_number(budget), shape.name(), seed);
}

void add_searches(const Sweep& sweep, std::vector<Cell>& cells) {
  for (const double lr : sweep.lr.search) {
    for (const Family& f : sweep.families) {
      if (!searches(sweep, f)) continue;
      const Shape shape = search_shape(sweep, f);
      const double budget = sweep.budgets.front();
      cells.push_back({.id = fmt::format("search-{}-{}-{}-lr{}", f.name, print_number(budget), shape.name(),
                                         print_number(lr)),
                       .role = Role::Search,
                       .family = f.name,
                       .budget = budget,
                       .shape = shape,
                       .seed = sweep.seeds.front(),
                       .lr = lr});
    }
  }
}

bool runs_at(const Sweep& sweep, const Family& f, double budget) {
  const std::vector<double>& budgets = sweep.budgets_of(f);
  return std::find(budgets.begin(), budgets.end(), budget) != budgets.end();
}

void add_curve_cell(const Sweep& sweep, const Decisions& decided, Role role, const Family& f, double budget,
                    const Shape& shape, std::int64_t seed, std::vector<Cell>& cells) {
  cells.push_back({.id = grid_id(f.name, budget, shape, seed),
                   .role = role,
                   .family = f.name,
                   .budget = budget,
                   .shape = shape,
                   .seed = seed,
                   .lr = lr_of(sweep, f, shape.width, decided)});
}

void add_grid(const Sweep& sweep, const Decisions& decided, double budget, std::vector<Cell>& cells) {
  std::size_t most = 0;
  for (const Family& f : sweep.families) {
    if (runs_at(sweep, f, budget)) most = std::max(most, sweep.shapes_of(f, budget).size());
  }
  for (const std::int64_t seed : sweep.seeds) {
    for (std::size_t i = 0; i < most; ++i) {
      for (const Family& f : sweep.families) {
        if (!runs_at(sweep, f, budget)) continue;
        const std::vector<Shape>& shapes = sweep.shapes_of(f, budget);
        if (i < shapes.size()) add_curve_cell(sweep, decided, Role::Grid, f, budget, shapes[i], seed, cells);
      }
    }
  }
}

void add_near(const Sweep& sweep, const Decisions& decided, double budget, std::vector<Cell>& cells) {
  for (const std::int64_t seed : sweep.seeds_near_minimum) {
    for (const Family& f : sweep.families) {
      const auto found = decided.near.find({f.name, budget});
      if (found == decided.near.end()) continue;
      for (const Shape& shape : found->second)
        add_curve_cell(sweep, decided, Role::Near, f, budget, shape, seed, cells);
    }
  }
}

}  // namespace

const char* name_of(Role role) {
  switch (role) {
    case Role::Search:
      return "search";
    case Role::Grid:
      return "grid";
    case Role::Near:
      return "near";
  }
  return "";
}

bool searches(const Sweep& sweep, const Family& family) { return !sweep.lr.search.empty() && !family.lr; }

Shape search_shape(const Sweep& sweep, const Family& family) {
  if (sweep.lr.shape) return *sweep.lr.shape;
  const std::vector<Shape>& shapes = sweep.shapes_of(family, sweep.budgets.front());
  if (shapes.empty()) throw InternalError("[isoflop] no shape to search the learning rate at");
  return shapes[shapes.size() / 2];
}

std::optional<double> lr_of(const Sweep& sweep, const Family& family, std::int64_t width,
                            const Decisions& decided) {
  double rate = sweep.base.train.lr;
  std::int64_t reference = sweep.lr.reference_width;
  if (family.lr) {
    rate = *family.lr;
  } else if (searches(sweep, family)) {
    const auto found = decided.lr.find(family.name);
    if (found == decided.lr.end()) return std::nullopt;
    rate = found->second;
  } else if (sweep.lr.fixed) {
    rate = *sweep.lr.fixed;
  }
  if (sweep.lr.width_exponent == 0) return rate;
  if (reference == 0) reference = search_shape(sweep, family).width;
  return rate *
         std::pow(static_cast<double>(width) / static_cast<double>(reference), -sweep.lr.width_exponent);
}

std::vector<Cell> cells_of(const Sweep& sweep, const Decisions& decided) {
  std::vector<Cell> cells;
  add_searches(sweep, cells);
  for (const double budget : sweep.budgets) {
    add_grid(sweep, decided, budget, cells);
    add_near(sweep, decided, budget, cells);
  }
  return cells;
}

std::int64_t undecided_near_cells(const Sweep& sweep, const Decisions& decided) {
  std::int64_t count = 0;
  for (const Family& f : sweep.families) {
    for (const double budget : sweep.budgets_of(f)) {
      if (decided.near.contains({f.name, budget})) continue;
      const auto shapes = static_cast<std::int64_t>(sweep.shapes_of(f, budget).size());
      count += std::min(2 * sweep.neighbours + 1, shapes) *
               static_cast<std::int64_t>(sweep.seeds_near_minimum.size());
    }
  }
  return count;
}

Config config_of(const Sweep& sweep, const Cell& cell, std::int64_t vocab) {
  Config c = sweep.base;
  Origins origins{{"", fmt::format("cell {}", cell.id)}};
  apply_entries(sweep.family(cell.family).overrides, c, origins);
  c.seed = static_cast<std::uint64_t>(cell.seed);
  c.model.width = cell.shape.width;
  c.model.depth = cell.shape.depth;
  c.model.own_head_dim = 0;  // the sweep's head_dim says how many heads there are
  c.model.heads =
      cell.shape.heads > 0 ? cell.shape.heads : std::max<std::int64_t>(1, cell.shape.width / sweep.head_dim);
  c.model.ffn_hidden = cell.shape.hidden;
  c.train.target_flops = cell.budget;
  c.train.tokens.reset();
  c.train.steps.reset();
  c.train.lr = cell.lr ? *cell.lr : sweep.lr.search.front();
  try {
    validate(c, origins);
    c = resolve(c, vocab);
    validate(c, origins);
  } catch (const UsageError& e) {
    const std::string text = e.what();
    if (text.find(cell.id) != std::string::npos) throw;
    throw UsageError(fmt::format("cell {}: {}", cell.id, text));
  }
  const std::int64_t steps = plan_horizon(c).steps;
  c.train.eval_every = sweep.evaluations > 1 ? std::max<std::int64_t>(1, steps / sweep.evaluations) : 0;
  c.train.checkpoint_every = sweep.checkpoints > 1 ? std::max<std::int64_t>(1, steps / sweep.checkpoints) : 0;
  return c;
}

}  // namespace fathom::isoflop
