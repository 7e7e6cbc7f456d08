// The ranks that a launcher started, met.
#pragma once

#include <memory>

#include "train/comm/communicator.h"
#include "train/comm/launch.h"

namespace fathom {

/// One rank without a launcher. UserError: this build has no MPI and the launcher means it, or MPI sees
/// another number of ranks than the launcher says. RankError: the ranks have not met in time.
std::shared_ptr<Communicator> open_communicator(const Launch& launch);

/// "Open MPI 4.1.4"; empty: this build has none.
std::string mpi_version();

}  // namespace fathom
