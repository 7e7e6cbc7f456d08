#include "train/comm/open_communicator.h"

#include <fmt/format.h>

#include "kernels/error.h"
#ifdef FATHOM_MPI
#include "train/comm/mpi_communicator.h"
#endif

namespace fathom {

std::shared_ptr<Communicator> open_communicator(const Launch& launch) {
  if (launch.launcher == Launcher::None) return make_lone_communicator();
  if (launch.launcher == Launcher::Torchrun) {
    throw UserError(
        fmt::format("A launcher started {} processes by RANK and WORLD_SIZE (as torchrun does), and Fathom's "
                    "ranks do not meet by MASTER_ADDR yet: they meet by MPI.",
                    launch.size),
        fmt::format("Start them with mpirun -n {0} or srun --mpi=pmix -n {0} (docs/distributed.md), or unset "
                    "WORLD_SIZE to train in one process.",
                    launch.size));
  }
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
