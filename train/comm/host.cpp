#include "train/comm/host.h"

#include <algorithm>
#include <array>
#include <memory>
#include <set>

#include <fmt/format.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sched.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kernels/error.h"

namespace fathom {

std::vector<int> allowed_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cores;
  if (::sched_getaffinity(0, sizeof set, &set) != 0) return cores;
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(i, &set)) cores.push_back(i);
  }
  return cores;
}

int threads_beside(const std::vector<std::vector<int>>& cores_of_ranks, std::size_t mine) {
  std::set<int> all;
  std::size_t listed = 0;
  for (const std::vector<int>& cores : cores_of_ranks) {
    all.insert(cores.begin(), cores.end());
    listed += cores.size();
  }
  const bool are_apart = listed == all.size();
  const std::size_t threads = are_apart ? cores_of_ranks.at(mine).size() : all.size() / cores_of_ranks.size();
  return std::max(1, static_cast<int>(threads));
}

std::size_t gpu_beside(const std::vector<std::vector<std::string>>& gpus_of_ranks, std::size_t mine) {
  std::set<std::string> all, taken;
  for (const auto& gpus : gpus_of_ranks) all.insert(gpus.begin(), gpus.end());
  std::size_t chosen = 0;
  for (std::size_t r = 0; r < gpus_of_ranks.size(); ++r) {
    const std::vector<std::string>& gpus = gpus_of_ranks[r];
    const auto free =
        std::find_if(gpus.begin(), gpus.end(), [&](const auto& g) { return !taken.contains(g); });
    if (free == gpus.end()) {
      throw UserError(
          fmt::format(
              "{} ranks were started on this host ({}), where they see {} GPU{}, and each needs one of "
              "its own.",
              gpus_of_ranks.size(), host_name(), all.size(), all.size() == 1 ? "" : "s"),
          "Start as many ranks as there are GPUs (srun --gpus-per-node and --ntasks-per-node, mpirun "
          "--map-by "
          "ppr:N:node), or train on the CPU (--device cpu).");
    }
    taken.insert(*free);
    if (r == mine) chosen = static_cast<std::size_t>(free - gpus.begin());
  }
  return chosen;
}

std::string host_name() {
  std::array<char, 256> name{};
  if (::gethostname(name.data(), name.size() - 1) != 0) return "unknown host";
  return name.data();
}

std::vector<std::string> host_addresses() {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) return {};
  const std::unique_ptr<ifaddrs, decltype(&::freeifaddrs)> all(list, &::freeifaddrs);
  std::vector<std::string> addresses;
  for (const ifaddrs* i = list; i != nullptr; i = i->ifa_next) {
    if (i->ifa_addr == nullptr || (i->ifa_flags & IFF_UP) == 0 || (i->ifa_flags & IFF_LOOPBACK) != 0)
      continue;
    if (i->ifa_addr->sa_family != AF_INET) continue;
    std::array<char, NI_MAXHOST> text{};
    if (::getnameinfo(i->ifa_addr, sizeof(sockaddr_in), text.data(), text.size(), nullptr, 0,
                      NI_NUMERICHOST) == 0)
      addresses.emplace_back(text.data());
  }
  return addresses;
}

}  // namespace fathom
