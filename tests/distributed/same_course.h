// Runs of different numbers of ranks, or on different devices, that compute the same but for rounding.
#pragma once

#include <string>

#include "tests/system/cli.h"

namespace fathom::testing {

/// Every number of the steps and evaluations that both runs have made is near: within `tolerance`, of numbers
/// above 1 a share of them.
void expect_close(const Experiment& e, const std::string& a, const std::string& b, double tolerance);

}  // namespace fathom::testing
