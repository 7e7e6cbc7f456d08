// Config keys that stand in another file than a config: a sweep's.
#pragma once

#include <span>

#include "src/config/document.h"
#include "src/config/parse.h"

namespace fathom {

/// Applies entries to `config` in their order, each key checked by itself; `origins` learns where they stand.
/// Who puts a config together from several places calls validate() when it is whole. Throws UsageError as
/// load_config does.
void apply_entries(std::span<const Entry> entries, Config& config, Origins& origins);

}  // namespace fathom
