// Reading a sweep file: strict keys, each value checked where it stands.
#include <algorithm>
#include <set>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "kernels/error.h"
#include "src/config/apply.h"
#include "src/config/keys.h"
#include "src/config/scalar.h"
#include "src/config/suggest.h"
#include "src/io/atomic_file.h"
#include "train/isoflop/sweep.h"

namespace fathom::isoflop {
namespace {

using Form = Entry::Form;

[[noreturn]] void refuse(const Entry& e, const std::string& expected) {
  throw UsageError(fmt::format("{}: {} is {}, but it must be {}.", e.where, e.path, show_value(e), expected));
}

double number(const Entry& e, double min, double max, const char* expected) {
  const auto x = e.form == Form::Plain ? read_number(e.text) : std::nullopt;
  if (!x || *x < min || *x > max) refuse(e, expected);
  return *x;
}

std::int64_t whole(const Entry& e, std::int64_t min, std::int64_t max) {
  const auto x = e.form == Form::Plain ? read_integer(e.text) : std::nullopt;
  if (!x || *x < min || *x > max) refuse(e, fmt::format("a whole number from {} to {}", min, max));
  return *x;
}

bool truth(const Entry& e) {
  const auto x = e.form == Form::Plain ? read_bool(e.text) : std::nullopt;
  if (!x) refuse(e, "true or false");
  return *x;
}

std::string text(const Entry& e) {
  if ((e.form != Form::Plain && e.form != Form::Quoted) || e.text.empty()) refuse(e, "text");
  return e.text;
}

const std::vector<std::string>& items(const Entry& e, const std::string& expected) {
  if (e.form != Form::List || e.items.empty()) refuse(e, expected);
  return e.items;
}

// Ascending and without repetition.
std::vector<double> positive_numbers(const Entry& e, const std::string& expected) {
  std::set<double> values;
  for (const std::string& item : items(e, expected)) {
    const auto x = read_number(item);
    if (!x || *x <= 0 || *x > 1e30 || !values.insert(*x).second) refuse(e, expected);
  }
  return {values.begin(), values.end()};
}

std::vector<std::int64_t> seeds(const Entry& e) {
  const char* const expected = "a list of different whole numbers, such as [1, 2]";
  std::vector<std::int64_t> out;
  for (const std::string& item : items(e, expected)) {
    const auto x = read_integer(item);
    if (!x || *x < 0 || std::find(out.begin(), out.end(), *x) != out.end()) refuse(e, expected);
    out.push_back(*x);
  }
  return out;
}

std::vector<Shape> shapes(const Entry& e) {
  const char* const expected =
      "a list of different shapes WIDTHxDEPTH, WIDTHxDEPTHxHEADS or WIDTHxDEPTHxHEADSxHIDDEN, such as "
      "[256x4, "
      "256x6, 384x8]";
  std::vector<Shape> out;
  for (const std::string& item : items(e, expected)) {
    const auto shape = read_shape(item);
    if (!shape || std::find(out.begin(), out.end(), *shape) != out.end()) refuse(e, expected);
    out.push_back(*shape);
  }
  return out;
}

// What stands below `shapes:`: a list; widths and depths; or lists by budget.
class GridReader {
 public:
  void read(const Entry& e, std::string_view below, ShapeGrid& grid) {
    if (below.empty()) {
      if (e.form != Form::Section) grid.everywhere = shapes(e);
    } else if (below == "widths") {
      widths_ = sizes(e);
    } else if (below == "depths") {
      depths_ = sizes(e);
    } else {
      const auto budget = read_number(below);
      if (!budget || *budget <= 0)
        throw UsageError(fmt::format("{}: {} is no budget.", e.where, show_text(below)),
                         "Below shapes stand budgets with a list of shapes each, or widths and depths.");
      grid.at[*budget] = shapes(e);
    }
    if (!widths_.empty() && !depths_.empty()) {
      // Every depth of a width before the next width.
      grid.everywhere.clear();
      for (const std::int64_t width : widths_) {
        for (const std::int64_t depth : depths_) grid.everywhere.push_back({.width = width, .depth = depth});
      }
    }
  }

 private:
  static std::vector<std::int64_t> sizes(const Entry& e) {
    const char* const expected = "a list of whole numbers, such as [128, 256]";
    std::vector<std::int64_t> out;
    for (const std::string& item : items(e, expected)) {
      const auto x = read_integer(item);
      if (!x || *x < 1) refuse(e, expected);
      out.push_back(*x);
    }
    return out;
  }

  std::vector<std::int64_t> widths_, depths_;
};

constexpr std::string_view kKeys[] = {"name",
                                      "base",
                                      "budgets",
                                      "families",
                                      "shapes",
                                      "head_dim",
                                      "lr",
                                      "seeds",
                                      "seeds_near_minimum",
                                      "neighbours",
                                      "max_passes",
                                      "allow_repeats",
                                      "evaluations",
                                      "checkpoints",
                                      "keep_models",
                                      "lr.fixed",
                                      "lr.search",
                                      "lr.shape",
                                      "lr.width_exponent",
                                      "lr.reference_width"};

// What the sweep sets for each cell, and the key of the sweep that says it.
struct Taken {
  std::string_view key, instead;
};
constexpr Taken kTaken[] = {{"seed", "seeds"},
                            {"model.width", "shapes"},
                            {"model.depth", "shapes"},
                            {"model.heads", "shapes (WIDTHxDEPTHxHEADS) or head_dim"},
                            {"model.head_dim", "head_dim"},
                            {"model.ffn_hidden", "shapes (WIDTHxDEPTHxHEADSxHIDDEN)"},
                            {"train.lr", "lr, of the sweep or of a family"},
                            {"train.target_flops", "budgets"},
                            {"train.tokens", "budgets"},
                            {"train.steps", "budgets"},
                            {"train.eval_every", "evaluations"},
                            {"train.checkpoint_every", "checkpoints"}};

void require_free(const Entry& e, std::string_view key) {
  for (const Taken& t : kTaken) {
    if (key == t.key)
      throw UsageError(
          fmt::format("{}: {} is not for a sweep's file to set: it differs by cell.", e.where, key),
          fmt::format("Give {}.", t.instead));
  }
}

[[noreturn]] void unknown(const Entry& e) {
  std::string_view nearest;
  int distance = 4;
  for (const std::string_view key : kKeys) {
    const int d = edit_distance(e.path, key);
    if (d < distance && d <= std::max(1, static_cast<int>(key.size()) / 3)) {
      nearest = key;
      distance = d;
    }
  }
  throw UsageError(fmt::format("{}: there is no key {}.", e.where, show_text(e.path)),
                   nearest.empty() ? suggest_key(e.path) : fmt::format("Did you mean {}?", nearest));
}

bool is_config_key(std::string_view path) {
  return find_key(path) != nullptr || is_section(path) || path == "experts" || path.starts_with("experts.");
}

bool good_name(std::string_view name) {
  const bool word = std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
  });
  return word && !name.empty() && name.size() <= 40 && name != "search";
}

class Loader {
 public:
  Loader(const std::filesystem::path& file, const std::optional<std::filesystem::path>& base) {
    sweep_.file = file;
    sweep_.name = file.stem().string();
    const std::vector<Entry> entries = read_document(read_file(file.string(), "sweep"), file.string());
    for (const Entry& e : entries) {
      if (e.path == "base") base_ = file.parent_path() / text(e);
    }
    if (base) base_ = *base;
    if (!base_.empty()) sweep_.base = load_config(base_);
    for (const Entry& e : entries) read(e);
    Origins origins;
    apply_entries(config_, sweep_.base, origins);
    check();
  }

  Sweep take() { return std::move(sweep_); }

 private:
  void read(const Entry& e) {
    const std::string& key = e.path;
    if (key == "base") return;
    if (key == "families") {
      if (e.form != Form::Section) refuse(e, "a section with a family's name a line");
      return;
    }
    if (key == "name") {
      sweep_.name = text(e);
    } else if (key == "budgets") {
      sweep_.budgets = positive_numbers(e, "a list of different training FLOPs, such as [1e15, 4e15]");
    } else if (key == "shapes" || key.starts_with("shapes.")) {
      grids_[""].read(e, below(key, "shapes"), sweep_.shapes);
    } else if (key == "head_dim") {
      sweep_.head_dim = whole(e, 2, 65536);
    } else if (key == "seeds") {
      sweep_.seeds = seeds(e);
    } else if (key == "seeds_near_minimum") {
      sweep_.seeds_near_minimum = seeds(e);
    } else if (key == "neighbours") {
      sweep_.neighbours = whole(e, 0, 64);
    } else if (key == "max_passes") {
      sweep_.max_passes = number(e, 1e-6, 1e9, "a number above 0");
    } else if (key == "allow_repeats") {
      sweep_.allow_repeats = truth(e);
    } else if (key == "evaluations") {
      sweep_.evaluations = whole(e, 1, 100000);
    } else if (key == "checkpoints") {
      sweep_.checkpoints = whole(e, 1, 100000);
    } else if (key == "keep_models") {
      sweep_.keep_models = truth(e);
    } else if (key == "lr" || key.starts_with("lr.")) {
      read_lr(e, below(key, "lr"));
    } else if (key.starts_with("families.")) {
      read_family(e, std::string_view(key).substr(9));
    } else if (is_config_key(key)) {
      require_free(e, key);
      config_.push_back(e);
    } else {
      unknown(e);
    }
  }

  static std::string_view below(std::string_view key, std::string_view section) {
    return key.size() > section.size() ? key.substr(section.size() + 1) : std::string_view{};
  }

  void read_lr(const Entry& e, std::string_view key) {
    LrRule& lr = sweep_.lr;
    if (key.empty()) {
      if (e.form != Form::Section) lr.fixed = rate(e);
    } else if (key == "fixed") {
      lr.fixed = rate(e);
    } else if (key == "search") {
      lr.search = positive_numbers(e, "a list of different learning rates, such as [1e-3, 2e-3, 4e-3]");
    } else if (key == "shape") {
      lr.shape = read_shape(text(e));
      if (!lr.shape) refuse(e, "a shape such as 256x4");
    } else if (key == "width_exponent") {
      lr.width_exponent = number(e, -4, 4, "a number from -4 to 4");
    } else if (key == "reference_width") {
      lr.reference_width = whole(e, 1, 65536);
    } else {
      unknown(e);
    }
  }

  static double rate(const Entry& e) { return number(e, 1e-12, 100, "a learning rate above 0, at most 100"); }

  // `path` is what stands below families: "mod", "mod.routing.kind", "mod.shapes.1e15".
  void read_family(const Entry& e, std::string_view path) {
    const std::string_view name = path.substr(0, path.find('.'));
    if (!good_name(name)) {
      throw UsageError(fmt::format("{}: a family cannot be called {}.", e.where, show_text(name)),
                       "A name has small letters, digits and _, at most 40, and is not 'search'.");
    }
    if (sweep_.families.empty() || sweep_.families.back().name != name) {
      Family family;
      family.name = name;
      family.where = e.where;
      sweep_.families.push_back(std::move(family));
    }
    Family& family = sweep_.families.back();
    const std::string_view key = below(path, name);
    if (key.empty()) {
      if (e.form != Form::Section && e.form != Form::Null)
        refuse(e, "the family's config keys, or empty (write {} or nothing)");
    } else if (key == "shapes" || key.starts_with("shapes.")) {
      grids_[family.name].read(e, below(key, "shapes"), family.shapes);
    } else if (key == "budgets") {
      family.budgets = positive_numbers(e, "a list of budgets of the sweep");
    } else if (key == "lr") {
      family.lr = rate(e);
    } else {
      Entry own = e;
      own.path = key;
      require_free(own, key);
      if (key == "device" || key == "deterministic" || key == "invariant" || key.starts_with("data.")) {
        throw UsageError(
            fmt::format("{}: {} must be the same for all families, or their cells would not compare.",
                        e.where, key),
            "Give it at the top of the file.");
      }
      if (!is_config_key(key))
        throw UsageError(fmt::format("{}: there is no key {} for a family.", e.where, show_text(key)),
                         suggest_key(key));
      family.overrides.push_back(std::move(own));
    }
  }

  [[noreturn]] void fail(const std::string& where, const std::string& problem,
                         const std::string& hint) const {
    throw UsageError(fmt::format("{}: {}", where.empty() ? sweep_.file.string() : where, problem), hint);
  }

  void check() const {
    const Sweep& s = sweep_;
    if (s.name.starts_with('.') || s.name.find_first_of("/\\\n\r\t") != std::string::npos)
      fail("", fmt::format("name is {}, which cannot name a folder.", show_text(s.name)), "");
    if (s.budgets.empty())
      fail("", "the sweep has no budgets.", "Give the training FLOPs of its cells: budgets: [1e15, 4e15].");
    if (s.families.empty())
      fail("", "the sweep has no families.", "Give at least one: families: {dense: {}}.");
    if (s.lr.fixed && !s.lr.search.empty())
      fail("", "lr is given both as a fixed rate and as a search.", "Give one of lr.fixed and lr.search.");
    const bool searches = !s.lr.search.empty();
    if (!searches && s.lr.width_exponent != 0 && s.lr.reference_width == 0)
      fail("", "lr.width_exponent needs the width at which the fixed rate holds.",
           "Give lr.reference_width.");
    if (searches && s.lr.search.size() < 2)
      fail("", "lr.search has one rate, so there is nothing to choose.", "Give lr.fixed instead.");
    std::set<std::string> names;
    for (const Family& f : s.families) {
      if (!names.insert(f.name).second)
        fail(f.where, fmt::format("the family {} stands here a second time.", f.name), "");
      check_family(f);
    }
    for (const std::int64_t seed : s.seeds_near_minimum) {
      if (std::find(s.seeds.begin(), s.seeds.end(), seed) != s.seeds.end())
        fail("", fmt::format("seeds_near_minimum has {}, which seeds has as well.", seed),
             "It is a list of further seeds.");
    }
  }

  void check_family(const Family& f) const {
    const Sweep& s = sweep_;
    for (const auto* grid : {&s.shapes, &f.shapes}) {
      for (const auto& [budget, list] : grid->at) {
        if (std::find(s.budgets.begin(), s.budgets.end(), budget) == s.budgets.end())
          fail(f.where, fmt::format("shapes has {}, which is none of the budgets.", print_number(budget)),
               "");
      }
    }
    for (const double budget : f.budgets) {
      if (std::find(s.budgets.begin(), s.budgets.end(), budget) == s.budgets.end())
        fail(f.where,
             fmt::format("family {} has the budget {}, which the sweep does not have.", f.name,
                         print_number(budget)),
             "Its budgets are some of the sweep's.");
    }
    for (const double budget : s.budgets_of(f)) {
      if (s.shapes_of(f, budget).empty())
        fail(f.where, fmt::format("family {} has no shapes at {} FLOPs.", f.name, print_number(budget)),
             "Give shapes: [256x4, 256x6], for the sweep, a family or a budget.");
    }
    if (!s.lr.search.empty() && !s.lr.shape && s.shapes_of(f, s.budgets.front()).empty())
      fail(f.where,
           fmt::format("family {} has no shapes at {} FLOPs, where the learning rate is searched.", f.name,
                       print_number(s.budgets.front())),
           "Give lr.shape.");
  }

  Sweep sweep_;
  std::filesystem::path base_;
  std::vector<Entry> config_;
  std::map<std::string, GridReader> grids_;  // by family; "": the sweep's
};

}  // namespace

Sweep load_sweep(const std::filesystem::path& file, const std::optional<std::filesystem::path>& base) {
  std::error_code code;
  if (std::filesystem::is_directory(file, code))
    throw UsageError(fmt::format("{} is a folder, and a sweep is a YAML file.", file.string()));
  if (!std::filesystem::exists(file, code))
    throw UsageError(fmt::format("there is no sweep file {}.", file.string()),
                     "An example: configs/isoflop/tiny.yaml.");
  return Loader(file, base).take();
}

}  // namespace fathom::isoflop
