// What a config costs, for the commands that show it.
#pragma once

#include <string>

#include "src/config/config.h"

namespace fathom::app {

/// The table of `fathom plan` for a resolved config.
std::string plan_text(const Config& resolved, const std::string& name);

/// The object of `fathom plan --json` (docs/flops.md), as text.
std::string plan_json(const Config& resolved, const std::string& name);

}  // namespace fathom::app
