// What a rank says of the machine that it runs on.
#pragma once

#include <string>
#include <vector>

namespace fathom {

std::string host_name();

/// The cores on which this process may run, which a launcher or a container may have cut down: ascending.
std::vector<int> allowed_cores();

/// Threads of one of the ranks of a host, each of which may run on the cores given: its own, where no other
/// rank has any of them; else an equal share of all. At least 1.
int threads_beside(const std::vector<std::vector<int>>& cores_of_ranks, std::size_t mine);

/// Which of the GPUs that it sees one of the ranks of a host takes, so that each has one of its own. A
/// launcher may show all of them to all ranks, or each rank some; they are given by names that mean the same
/// to all ranks. UserError, to all of them: there are not enough.
std::size_t gpu_beside(const std::vector<std::vector<std::string>>& gpus_of_ranks, std::size_t mine);

/// The addresses at which other hosts may reach this one: IPv4, numeric, of interfaces that are up;
/// none of the loopback.
std::vector<std::string> host_addresses();

}  // namespace fathom
