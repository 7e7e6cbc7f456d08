// The ranks that a launcher started, met.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "train/comm/communicator.h"
#include "train/comm/launch.h"

namespace fathom {

/// One rank without a launcher. UserError: this build has no MPI and the launcher means it, or MPI sees
/// another number of ranks than the launcher says. RankError: the ranks have not met in time.
std::shared_ptr<Communicator> open_communicator(const Launch& launch);

/// The same ranks; on GPUs, whose collectives on the backend's memory are NCCL's. A collective: each rank has
/// opened its backend. UserError: some have a GPU and some have not, or this build or this machine has no
/// NCCL, or it does not connect the GPUs within kRankPatience times `timeout` seconds.
std::shared_ptr<Communicator> with_devices(std::shared_ptr<Communicator> ranks,
                                           const std::shared_ptr<Backend>& backend,
                                           double timeout = kRankTimeout);

/// "Open MPI 4.1.4"; empty: this build has none.
std::string mpi_version();

}  // namespace fathom
