// A sweep as its file says it: which families of models, of which shapes, at which budgets of training FLOPs.
// docs/isoflop.md lists every key.
//
// A sweep file is a config (docs/config.md) with the keys of a sweep beside it. The config's keys hold for
// every cell; a family's own keys come over them; width, depth, heads, hidden width, seed, learning rate and
// horizon are the sweep's to set.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/config/config.h"
#include "src/config/document.h"

namespace fathom::isoflop {

/// A model's shape. 0 heads: width / head_dim of the sweep; 0 hidden: the config's rule (8/3 of the width).
struct Shape {
  std::int64_t width = 0;
  std::int64_t depth = 0;
  std::int64_t heads = 0;
  std::int64_t hidden = 0;

  /// As the file writes it: "320x6", "320x6x5", "320x6x5x896".
  std::string name() const;
  bool operator==(const Shape&) const = default;
};

/// Reads "WIDTHxDEPTH[xHEADS[xHIDDEN]]"; nothing for any other text.
std::optional<Shape> read_shape(std::string_view text);

/// Shapes for every budget, or by budget.
struct ShapeGrid {
  std::vector<Shape> everywhere;
  std::map<double, std::vector<Shape>> at;  // by budget; comes before `everywhere`

  bool empty() const { return everywhere.empty() && at.empty(); }
  /// Those of one budget; empty when the grid has none for it.
  const std::vector<Shape>& of(double budget) const;
};

struct Family {
  std::string name;
  std::vector<Entry> overrides;  // config keys, as they stand in the file
  ShapeGrid shapes;              // empty: the sweep's
  std::vector<double> budgets;   // empty: all of the sweep's
  std::optional<double> lr;      // fixed for this family, at the rule's reference width
  std::string where;             // "tiny.yaml:12"
};

/// How a cell's peak learning rate follows from its family and width:
///   lr(width) = lr0 * (width / reference_width)^-width_exponent,
/// the same at every budget. lr0 is given, or the best of `search`, which every family tries at the smallest
/// budget on one shape with the first seed: the same effort for each.
struct LrRule {
  std::optional<double> fixed;  // neither: train.lr of the config
  std::vector<double> search;   // ascending
  std::optional<Shape> shape;   // of the search; none: the middle one of the family's at the smallest budget
  double width_exponent = 0;    // 0: constant in width
  std::int64_t reference_width = 0;  // 0: the search's width; a fixed rate with an exponent needs it
};

struct Sweep {
  std::string name;
  std::filesystem::path file;   // for messages
  Config base;                  // with the file's own config keys; its horizon means nothing
  std::vector<double> budgets;  // training FLOPs of a cell, ascending
  std::vector<Family> families;
  ShapeGrid shapes;
  std::int64_t head_dim = 64;  // of shapes that do not say their heads
  LrRule lr;
  std::vector<std::int64_t> seeds = {1};
  std::vector<std::int64_t> seeds_near_minimum;  // further ones for the best size and its neighbours
  std::int64_t neighbours = 1;                   // on each side of the best size
  double max_passes = 4;                         // over the training text, of a cell that is fitted
  bool allow_repeats = false;                    // cells above it run and are drawn, never fitted
  std::int64_t evaluations = 8;                  // of a cell, its last one included
  std::int64_t checkpoints = 4;                  // of a cell, its last one included
  bool keep_models = true;                       // false: a finished cell's checkpoints are removed

  /// UsageError names the sweep's families when there is none of this name.
  const Family& family(std::string_view name) const;
  /// The budgets at which a family runs, ascending.
  const std::vector<double>& budgets_of(const Family& family) const;
  const std::vector<Shape>& shapes_of(const Family& family, double budget) const;
};

/// Reads a sweep file. `base` takes the place of the file's own `base`, which is relative to the file. Throws
/// UsageError: one paragraph with file and line, the key, its value, what was expected and, for an unknown
/// key, the one that was most likely meant.
Sweep load_sweep(const std::filesystem::path& file,
                 const std::optional<std::filesystem::path>& base = std::nullopt);

}  // namespace fathom::isoflop
