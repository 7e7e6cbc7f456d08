#include "app/rank_device.h"

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <spdlog/spdlog.h>

#include "app/device.h"
#ifdef FATHOM_CUDA
#include "kernels/cuda/device_query.h"
#endif
#include "kernels/error.h"
#include "train/comm/host.h"
#include "train/comm/open_communicator.h"

namespace fathom::app {

namespace {

#ifdef FATHOM_CUDA
std::vector<std::string> gpus() {
  std::vector<std::string> names;
  for (const cuda::Device& d : cuda::query_devices().devices) names.push_back(d.uuid);
  return names;
}

// Empty: GPU `number` can be used.
std::string why_not(std::size_t number) {
  try {
    cuda::prove_device(cuda::query_devices().devices.at(number));
    return "";
  } catch (const UserError& e) {
    return e.what();
  }
}
#else
std::vector<std::string> gpus() {
  throw UserError("This build of Fathom computes on the CPU only.",
                  "Build with the preset cuda (docs/cuda.md).");
}
std::string why_not(std::size_t) { return "this build computes on the CPU only (docs/cuda.md)."; }
#endif

std::vector<std::string> gpus_if_any() {
  try {
    return gpus();
  } catch (const UserError&) {  // whoever opens one says it again
    return {};
  }
}

// Of those that this rank sees, the number of its own, where "cuda" or "auto" is asked for and its host shows
// any. A collective.
std::optional<std::size_t> gpu_of_rank(Communicator& ranks, const std::string& asked) {
  const bool any_gpu = asked == "cuda" || asked == "auto";
  const std::vector<std::string> own = any_gpu ? gpus_if_any() : std::vector<std::string>{};
  const std::string host = host_name();
  std::vector<std::vector<std::string>> seen;  // by this host's ranks
  std::size_t mine = 0;
  bool anybody_sees = false;
  const std::vector<std::string> all = ranks.gather(fmt::format("{}\n{}", host, fmt::join(own, " ")));
  for (std::size_t r = 0; r < all.size(); ++r) {
    std::istringstream in(all[r]);
    std::string of;
    std::getline(in, of);
    if (of != host) continue;
    if (static_cast<int>(r) == ranks.rank()) mine = seen.size();
    auto& names = seen.emplace_back();
    for (std::string name; in >> name;) names.push_back(name);
    anybody_sees |= !names.empty();
  }
  if (any_gpu) return anybody_sees ? std::optional(gpu_beside(seen, mine)) : std::nullopt;
  if (asked.starts_with("cuda:") && ranks.local_size() > 1) {
    throw UsageError(fmt::format("--device {} names one GPU, and {} ranks of this host ({}) need one each.",
                                 asked, ranks.local_size(), host),
                     "Give --device cuda: each rank takes one of those that CUDA_VISIBLE_DEVICES shows.");
  }
  return std::nullopt;
}

// "cuda:2" where the rank has a GPU, else what was asked for. Under "auto" they all compute on the CPU where
// none of their GPUs can be used, as one rank does; where some can, whoever opens one of the others says why
// not. Each rank tries its own alone: a trial leaves a part of a GPU's memory taken, and a GPU may serve one
// process only. A collective.
std::string device_of_rank(Communicator& ranks, const std::string& asked) {
  const std::optional<std::size_t> gpu = gpu_of_rank(ranks, asked);
  std::string why = "it has no GPU";
  if (gpu) why = asked == "auto" ? why_not(*gpu) : "";
  const std::vector<std::string> all = ranks.gather(why);
  if (!gpu) return asked;
  if (std::any_of(all.begin(), all.end(), [](const std::string& w) { return w.empty(); }))
    return fmt::format("cuda:{}", *gpu);
  spdlog::warn("Warning: there is a GPU's driver, but the CPU computes: {}", why);
  return "cpu";
}

}  // namespace

RankOnDevice open_rank(const std::shared_ptr<Communicator>& ranks, const Globals& globals,
                       const Config& config) {
  if (ranks->alone()) return {open_training_backend(globals, config), ranks};
  Globals own = globals;
  own.device = device_of_rank(*ranks, globals.device == "auto" ? config.device : globals.device);
  RankOnDevice opened{open_training_backend(own, config), nullptr};
  opened.ranks = with_devices(ranks, opened.backend, config.train.rank_timeout);
  return opened;
}

void require_gpus(int number) {
  std::size_t there = 0;
  try {
    there = gpus().size();
  } catch (const UserError& e) {
    throw UserError(fmt::format("--gpus {} cannot be had: {}", number, e.what()));
  }
  if (static_cast<std::size_t>(number) <= there) return;
  throw UserError(
      fmt::format("--gpus {} asks for {} GPUs, and this machine shows {}.", number, number, there),
      "fathom doctor lists them; CUDA_VISIBLE_DEVICES hides some.");
}

}  // namespace fathom::app
