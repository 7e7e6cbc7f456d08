#include "train/comm/launch.h"

#include <charconv>
#include <cstdlib>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

namespace {

std::optional<int> number(const Environment& environment, const char* name) {
  const std::optional<std::string> text = environment(name);
  if (!text || text->empty()) return std::nullopt;
  int value = 0;
  const char* end = text->data() + text->size();
  const auto [stop, error] = std::from_chars(text->data(), end, value);
  if (error != std::errc() || stop != end || value < 0) {
    throw UserError(fmt::format("The environment says {}={}, which is no number.", name, *text),
                    "A launcher of several processes sets it; unset it to train in one.");
  }
  return value;
}

// The launcher that says rank and size by these names, if it started more than one process.
std::optional<Launch> by(const Environment& environment, Launcher launcher, const char* rank_name,
                         const char* size_name) {
  // One alone is somebody else's: pods and schedulers have a RANK of their own.
  if (environment(rank_name).value_or("").empty() || environment(size_name).value_or("").empty())
    return std::nullopt;
  const std::optional<int> rank = number(environment, rank_name), size = number(environment, size_name);
  if (!rank || !size || *size <= 1) return std::nullopt;
  if (*rank >= *size) {
    throw UserError(fmt::format("The environment says {}={} and {}={}: ranks count from 0.", rank_name, *rank,
                                size_name, *size),
                    "A launcher of several processes sets both; unset them to train in one.");
  }
  return Launch{.launcher = launcher, .rank = *rank, .size = *size};
}

// torchrun's own agent listens at MASTER_PORT, and says so: then Fathom's ranks meet at the port behind it.
Launch met_at_master(const Environment& environment, Launch launch) {
  const std::optional<std::string> master = environment("MASTER_ADDR");
  const std::optional<int> port = number(environment, "MASTER_PORT");
  constexpr int kMostPorts = 65535;
  if (!master || master->empty() || !port || *port == 0 || *port >= kMostPorts) {
    throw UserError(
        fmt::format("The environment says RANK={} and WORLD_SIZE={}, but not where rank 0 is to be met.",
                    launch.rank, launch.size),
        "Set MASTER_ADDR to its host and MASTER_PORT to a free port there, or unset WORLD_SIZE to "
        "train in one process.");
  }
  launch.master = *master;
  launch.port = environment("TORCHELASTIC_USE_AGENT_STORE").value_or("") == "True" ? *port + 1 : *port;
  return launch;
}

}  // namespace

Environment process_environment() {
  return [](const char* name) -> std::optional<std::string> {
    const char* value = std::getenv(name);
    return value != nullptr ? std::optional<std::string>(value) : std::nullopt;
  };
}

Launch read_launch(const Environment& environment) {
  if (std::optional<Launch> own = by(environment, Launcher::Own, kOwnRank, kOwnRanks)) {
    own->master = "127.0.0.1";
    own->port = number(environment, kOwnPort).value_or(0);
    own->listener = number(environment, kOwnListener).value_or(-1);
    return *own;
  }
  // srun with an MPI plugin sets PMI's variables as well, and is asked first so that it is named. Those of
  // the step count: a batch script that runs once has SLURM_NTASKS too.
  if (environment("SLURM_STEP_ID") && !environment("OMPI_COMM_WORLD_SIZE")) {
    for (const char* size : {"SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"}) {
      if (!environment(size)) continue;
      const std::optional<Launch> found = by(environment, Launcher::Slurm, "SLURM_PROCID", size);
      if (found) return *found;
      break;
    }
  }
  using Names = std::pair<const char*, const char*>;
  for (const auto& [rank, size] :
       {Names{"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"}, Names{"PMI_RANK", "PMI_SIZE"}}) {
    if (const std::optional<Launch> found = by(environment, Launcher::Mpi, rank, size)) return *found;
  }
  const std::optional<Launch> found = by(environment, Launcher::Torchrun, "RANK", "WORLD_SIZE");
  return found ? met_at_master(environment, *found) : Launch{};
}

}  // namespace fathom
