#include "train/isoflop/sweep.h"

#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "kernels/error.h"
#include "src/config/scalar.h"

namespace fathom::isoflop {

std::string Shape::name() const {
  std::string text = fmt::format("{}x{}", width, depth);
  if (heads > 0) text += fmt::format("x{}", heads);
  if (hidden > 0) text += fmt::format("x{}", hidden);
  return text;
}

std::optional<Shape> read_shape(std::string_view text) {
  Shape shape;
  std::int64_t* const parts[] = {&shape.width, &shape.depth, &shape.heads, &shape.hidden};
  std::size_t count = 0;
  while (true) {
    const std::size_t x = text.find('x');
    const auto value = read_integer(text.substr(0, x));
    if (count == std::size(parts) || !value || *value < 1 || *value > 1048576) return std::nullopt;
    *parts[count++] = *value;
    if (x == std::string_view::npos) break;
    text.remove_prefix(x + 1);
  }
  if (count < 2) return std::nullopt;
  return shape;
}

const std::vector<Shape>& ShapeGrid::of(double budget) const {
  const auto found = at.find(budget);
  return found == at.end() ? everywhere : found->second;
}

const Family& Sweep::family(std::string_view wanted) const {
  std::vector<std::string> names;
  for (const Family& f : families) {
    if (f.name == wanted) return f;
    names.push_back(f.name);
  }
  throw UsageError(fmt::format("the sweep {} has no family {}.", name, wanted),
                   fmt::format("It has {}.", fmt::join(names, ", ")));
}

const std::vector<double>& Sweep::budgets_of(const Family& f) const {
  return f.budgets.empty() ? budgets : f.budgets;
}

const std::vector<Shape>& Sweep::shapes_of(const Family& f, double budget) const {
  const std::vector<Shape>& own = f.shapes.of(budget);
  return own.empty() ? shapes.of(budget) : own;
}

}  // namespace fathom::isoflop
