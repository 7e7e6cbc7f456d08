#include "src/config/suggest.h"

#include <algorithm>
#include <array>
#include <vector>

#include <fmt/format.h>

#include "src/config/keys.h"

namespace fathom {
namespace {

constexpr std::size_t kLongest = 64;

// The names that stand directly in a section: its keys and its sections.
std::vector<std::string_view> names_in(std::string_view section) {
  std::vector<std::string_view> names;
  for (const Key& key : config_keys()) {
    std::string_view rest = key.path;
    if (!section.empty()) {
      if (!rest.starts_with(section) || rest.size() <= section.size() || rest[section.size()] != '.')
        continue;
      rest.remove_prefix(section.size() + 1);
    }
    rest = rest.substr(0, rest.find('.'));
    if (std::find(names.begin(), names.end(), rest) == names.end()) names.push_back(rest);
  }
  return names;
}

bool near(int distance, std::string_view word) {
  return distance <= std::max(1, static_cast<int>(word.size()) / 3);
}

}  // namespace

int edit_distance(std::string_view a, std::string_view b) {
  a = a.substr(0, kLongest);
  b = b.substr(0, kLongest);
  std::array<std::array<int, kLongest + 1>, kLongest + 1> d;
  for (std::size_t i = 0; i <= a.size(); ++i) {
    for (std::size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        d[i][j] = static_cast<int>(i + j);
        continue;
      }
      d[i][j] =
          std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
      }
    }
  }
  return d[a.size()][b.size()];
}

std::string suggest_key(std::string_view path) {
  const std::size_t dot = path.rfind('.');
  const std::string_view leaf = path.substr(dot == path.npos ? 0 : dot + 1);
  std::string_view section = path.substr(0, dot == path.npos ? 0 : dot);

  std::string best;
  int distance = 1 << 20;
  const auto consider = [&](int d, std::string_view word, std::string_view suggestion) {
    if (near(d, word) && d < distance) {
      distance = d;
      best = suggestion;
    }
  };
  const auto names = names_in(section);
  for (const std::string_view name : names) {
    consider(edit_distance(leaf, name), name,
             section.empty() ? std::string(name) : fmt::format("{}.{}", section, name));
  }
  // A key of another section, by its own name or by its whole path; an equally near one of this section comes
  // first.
  for (const Key& key : config_keys()) {
    consider(edit_distance(leaf, key.leaf()), key.leaf(), key.path);
    if (dot != path.npos) consider(edit_distance(path, key.path), key.path, key.path);
  }
  if (!best.empty()) return fmt::format("Did you mean {}?", best);
  if (names.empty()) return "The sections are model, routing, data and train.";
  return section.empty() ? fmt::format("The top level has {}.", fmt::join(names, ", "))
                         : fmt::format("The section {} has {}.", section, fmt::join(names, ", "));
}

}  // namespace fathom
