// Ranks that meet at MASTER_ADDR and MASTER_PORT, as torchrun's do, without MPI: every exchange goes through
// rank 0. Sums are made in the order of the ranks. For what is on the host of a training whose devices have a
// faster way, and for few ranks of small models on CPUs.
#pragma once

#include <memory>

#include "train/comm/communicator.h"
#include "train/comm/launch.h"

namespace fathom {

/// RankError: ranks, which are named, have not come within `timeout` seconds, or rank 0 has not. UserError:
/// the address cannot be used.
std::shared_ptr<Communicator> make_tcp_communicator(const Launch& launch, double timeout = kRankTimeout);

}  // namespace fathom
