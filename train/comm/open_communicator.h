// The ranks that a launcher started, met.
#pragma once

#include <memory>

#include "train/comm/communicator.h"
#include "train/comm/launch.h"

namespace fathom {

/// One rank without a launcher. UserError: this build has no MPI, the launcher uses none, or MPI sees another
/// number of ranks than the launcher says.
std::shared_ptr<Communicator> open_communicator(const Launch& launch);

/// "Open MPI 4.1.4"; empty: this build has none.
std::string mpi_version();

}  // namespace fathom
