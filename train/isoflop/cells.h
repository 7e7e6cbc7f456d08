// The cells of a sweep: each one training, at one budget, of one family, shape and seed.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "train/isoflop/sweep.h"

namespace fathom::isoflop {

enum class Role {
  Search,  // tries one learning rate
  Grid,    // a point of an isoFLOP curve
  Near     // a further seed beside a curve's minimum
};
const char* name_of(Role role);  // "search", "grid", "near"

struct Cell {
  std::string id;  // also its folder's name: "mod-1e15-320x6-s1", "search-mod-1e15-256x4-lr0.002"
  Role role = Role::Grid;
  std::string family;
  double budget = 0;  // training FLOPs
  Shape shape;        // as the sweep's file writes it
  std::int64_t seed = 1;
  std::optional<double> lr;  // none: the family's search has not decided yet
};

/// What the results so far have decided.
struct Decisions {
  std::map<std::string, double> lr;  // by family: the best rate of its search
  /// By family and budget: the shapes beside the minimum, which get the further seeds.
  std::map<std::pair<std::string, double>, std::vector<Shape>> near;
};

/// The shape at which a family's rates are searched, and its width.
Shape search_shape(const Sweep& sweep, const Family& family);
/// Whether the family's rate comes from a search.
bool searches(const Sweep& sweep, const Family& family);
/// lr(width) of the rule in sweep.h, from the rate at the reference width; nothing while a search is open.
std::optional<double> lr_of(const Sweep& sweep, const Family& family, std::int64_t width,
                            const Decisions& decided);

/// Every cell that is known: the searches, the grid, and the further seeds where they are decided. In the
/// order in which they are run: searches first, then by budget, seed, shape and family.
std::vector<Cell> cells_of(const Sweep& sweep, const Decisions& decided);

/// How many cells of further seeds there will be at most, beyond cells_of: those of curves that are not
/// decided yet.
std::int64_t undecided_near_cells(const Sweep& sweep, const Decisions& decided);

/// The config that trains the cell, resolved for a store of `vocab` ids: one horizon (target_flops), its
/// evaluations and checkpoints. While the rate is undecided, train.lr is the first of the search. Throws
/// UsageError when the config's keys contradict each other; the message names the cell.
Config config_of(const Sweep& sweep, const Cell& cell, std::int64_t vocab);

}  // namespace fathom::isoflop
