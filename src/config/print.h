// Printing a configuration, and comparing two of them.
#pragma once

#include <string>

#include "src/config/config.h"

namespace fathom {

/// YAML with every key; parse_config reads it back to the same Config.
std::string to_yaml(const Config& config);

/// The keys that differ, a line each: "model.depth: 4 here, 6 there". Empty when equal.
std::string difference(const Config& here, const Config& there);

/// The table of every key for docs/config.md, in Markdown.
std::string config_reference();

}  // namespace fathom
