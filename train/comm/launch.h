// Who started this process, and as which of how many: read from the environment that launchers leave.
#pragma once

#include <functional>
#include <optional>
#include <string>

namespace fathom {

enum class Launcher {
  None,      // one process
  Mpi,       // mpirun, mpiexec: OMPI_*, PMI_*, PMIX_*
  Slurm,     // srun: SLURM_*; its ranks meet by MPI too
  Torchrun,  // RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: its ranks meet there, without MPI
  Own        // this program (start_ranks.h): likewise
};

/// What start_ranks() leaves in the environment: rank, number of ranks, rank 0's port on this host, and for
/// rank 0 the descriptor that listens there.
inline constexpr const char* kOwnRank = "FATHOM_RANK";
inline constexpr const char* kOwnRanks = "FATHOM_RANKS";
inline constexpr const char* kOwnPort = "FATHOM_PORT";
inline constexpr const char* kOwnListener = "FATHOM_LISTENER";

struct Launch {
  Launcher launcher = Launcher::None;
  int rank = 0;
  int size = 1;
  std::string master = {};  // Torchrun and Own: rank 0's host
  int port = 0;             // and where it listens
  int listener = -1;        // the descriptor that rank 0 listens by; -1: it opens one
};

/// The value of a variable; nothing when it is not set.
using Environment = std::function<std::optional<std::string>(const char* name)>;
Environment process_environment();

/// UserError: a variable holds no number, a rank is not below the number of ranks, or it is not said where
/// they meet.
Launch read_launch(const Environment& environment);

}  // namespace fathom
