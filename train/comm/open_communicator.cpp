#include "train/comm/open_communicator.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "kernels/error.h"
#include "train/comm/tcp_communicator.h"
#ifdef FATHOM_NCCL
#include "train/comm/device_communicator.h"
#include "train/comm/nccl_transport.h"
#endif
#ifdef FATHOM_MPI
#include "train/comm/mpi_communicator.h"
#endif

namespace fathom {

std::shared_ptr<Communicator> open_communicator(const Launch& launch) {
  if (launch.launcher == Launcher::None) return make_lone_communicator();
  if (launch.launcher == Launcher::Torchrun || launch.launcher == Launcher::Own)
    return make_tcp_communicator(launch);
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

std::shared_ptr<Communicator> with_devices(std::shared_ptr<Communicator> ranks,
                                           const std::shared_ptr<Backend>& backend,
                                           [[maybe_unused]] double timeout) {
  if (ranks->alone()) return ranks;
  const std::string mine = backend->is_cpu() ? "the CPU" : "a GPU";
  const std::vector<std::string> all = ranks->gather(mine);
  const auto other = std::find_if(all.begin(), all.end(), [&](const auto& of) { return of != all.front(); });
  if (other != all.end()) {
    const auto rank = static_cast<int>(other - all.begin());
    throw UserError(fmt::format("Rank {} ({}) would compute on {}, and rank 0 ({}) on {}.", rank,
                                ranks->where(rank), *other, ranks->where(0), all.front()),
                    "Ranks compute on devices of one kind: give all of them --device cuda, or --device cpu.");
  }
  if (backend->is_cpu()) return ranks;
#ifdef FATHOM_NCCL
  std::unique_ptr<DeviceTransport> transport = make_nccl_transport(*ranks, backend, timeout);
  return make_device_communicator(std::move(ranks), std::move(transport));
#else
  throw UserError(
      fmt::format("{} ranks were started on GPUs, which train together through NCCL, and this build of "
                  "Fathom is without it.",
                  ranks->size()),
      "Install libnccl-dev of NVIDIA's repository or let scripts/setup-cuda.sh --nccl fetch its header, and "
      "build again; or train in one process on one GPU.");
#endif
}

#ifndef FATHOM_MPI
std::string mpi_version() { return ""; }
#endif

}  // namespace fathom
