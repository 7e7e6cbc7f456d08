// Ranks that meet by MPI, and reduce on the host's memory: the CPU backend's. Only with FATHOM_MPI.
#pragma once

#include <memory>

#include "train/comm/communicator.h"
#include "train/comm/launch.h"

namespace fathom {

/// Initialises MPI; once a process. UserError: MPI sees another number of ranks than the launcher says.
std::shared_ptr<Communicator> make_mpi_communicator(const Launch& launch);

}  // namespace fathom
