// One small training of every kind of routing.
#pragma once

#include <string>
#include <vector>

#include "src/config/config.h"

namespace fathom::testing {

struct Kind {
  std::string name;
  Config config;
};

/// Eight sequences of 16 tokens a step.
std::vector<Kind> all_kinds();

}  // namespace fathom::testing
