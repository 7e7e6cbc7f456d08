// Processes under mpirun, or under the program itself (--ranks), to be watched and killed one by one.
#pragma once

#include <string>
#include <vector>

#include "tests/system/cli.h"

namespace fathom::testing {

/// Skips the test, with the reason, where this build or this machine has no MPI.
#define SKIP_WITHOUT_MPI() \
  if (const std::string why = ::fathom::testing::why_no_mpi(); !why.empty()) GTEST_SKIP() << why
std::string why_no_mpi();

/// The words of `mpirun -n N COMMAND`, with what containers, root and few cores need.
std::vector<std::string> mpirun(int ranks, const std::vector<std::string>& command);
/// Of a command of its own for each rank.
std::vector<std::string> mpirun(const std::vector<std::vector<std::string>>& commands);

/// A launcher in the background; its ranks go with it.
class Ranked : public Background {
 public:
  Ranked(const TempFolder& folder, const std::vector<std::string>& words, Gpus gpus = Gpus::None);
  ~Ranked();
  /// Sends a rank a signal; waits until it is there.
  void signal_rank(int rank, int number);
  /// Until the launcher has noticed that a rank, which was sent a signal, has ended.
  void await_end_of(int rank);

 private:
  std::vector<pid_t> pids_;
};

/// `mpirun -n RANKS fathom ARGUMENTS`, to its end.
Outcome fathom_ranks(const TempFolder& folder, int ranks, const std::string& arguments);

}  // namespace fathom::testing
