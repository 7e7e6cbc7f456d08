// Ranks that are threads of this process: a communicator whose sums are made in the order of the ranks, so
// that what several ranks compute can be looked at from within.
#pragma once

#include <functional>
#include <memory>

#include "train/comm/communicator.h"

namespace fathom::testing {

/// Runs `body` as each of `ranks`, and waits for all of them. The first exception of one breaks the others
/// off and is thrown again.
void run_as_ranks(int ranks, const std::function<void(std::shared_ptr<Communicator>)>& body);

}  // namespace fathom::testing
