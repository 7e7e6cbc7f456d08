// The one table of the configuration's keys. Reading, printing, ranges, "did you mean" and docs/config.md all
// walk it, so none of them can drift from another.
#pragma once

#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/config/config.h"
#include "src/config/document.h"

namespace fathom {

/// The numbers that a key accepts. Doubles hold every bound exactly.
struct Range {
  double min = -std::numeric_limits<double>::infinity();
  double max = std::numeric_limits<double>::infinity();
  bool above_min = false;  // min itself is not accepted
  bool below_max = false;  // max itself is not accepted

  bool holds(double x) const { return (above_min ? x > min : x >= min) && (below_max ? x < max : x <= max); }
};

struct Key {
  std::string_view path;    // "routing.causal.method"
  Range range;              // numbers only
  std::string_view reason;  // why that range; may be empty
  std::string_view help;    // what the key means, for docs/config.md and --print-config

  std::string_view type;  // "a whole number", "a number", "true or false", "text", "one of", ...
  std::span<const char* const> choices;  // "one of" only
  bool optional;                         // may be left unset

  /// Stores the entry's value. Returns false if it is of another type or out of range.
  bool (*read)(Config&, const Key&, const Entry&);
  /// The value as YAML, "null" where it is unset.
  std::string (*print)(const Config&);

  std::string_view section() const {
    return path.substr(0, path.rfind('.') == path.npos ? 0 : path.rfind('.'));
  }
  std::string_view leaf() const { return path.substr(path.rfind('.') + 1); }
};

/// Every key, in the order in which --print-config shows them; a section's keys stand together.
std::span<const Key> config_keys();

/// nullptr if there is none.
const Key* find_key(std::string_view path);

/// Whether `path` is a section that holds keys or sections ("model", "routing.causal").
bool is_section(std::string_view path);

/// What the key accepts, as words: "a whole number from 1 to 4096".
std::string expectation(const Key& key);

}  // namespace fathom
