#include "train/comm/open_communicator.h"

#include <fmt/format.h>

#include "kernels/error.h"
#include "train/comm/tcp_communicator.h"
#ifdef FATHOM_MPI
#include "train/comm/mpi_communicator.h"
#endif

namespace fathom {

std::shared_ptr<Communicator> open_communicator(const Launch& launch) {
  if (launch.launcher == Launcher::None) return make_lone_communicator();
  if (launch.launcher == Launcher::Torchrun) return make_tcp_communicator(launch);
#ifdef FATHOM_MPI
  return make_mpi_communicator(launch);
#else
  throw UserError(
      fmt::format("{} started {} processes to train together, and this build of Fathom has no MPI by which "
                  "they would meet.",
                  launch.launcher == Launcher::Slurm ? "srun" : "mpirun", launch.size),
      "Install libopenmpi-dev (scripts/setup.sh does), configure with -DFATHOM_MPI=ON and build again; or "
      "start "
      "one process.");
#endif
}

#ifndef FATHOM_MPI
std::string mpi_version() { return ""; }
#endif

}  // namespace fathom
