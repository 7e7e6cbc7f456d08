#include "app/device.h"

#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include "kernels/error.h"

namespace fathom::app {

std::shared_ptr<Backend> open_backend(const Globals& globals, const Config& config) {
  const std::string device = globals.device == "auto" ? config.device : globals.device;
  if (device.starts_with("cuda")) {
    throw UserError(
        fmt::format("--device {} asks for a GPU, and this version computes on the CPU only.", device),
        "Use --device cpu, or auto.");
  }
  if (device != "cpu" && device != "auto") {
    throw UsageError(fmt::format("--device {} is not a device.", device),
                     "Expected cpu, cuda, cuda:N or auto.");
  }
  if (config.train.precision != "fp32") {
    throw UsageError(
        fmt::format("train.precision is {}, which the CPU does not train in.", config.train.precision),
        "Use --set train.precision=fp32.");
  }
  return make_cpu_backend({.invariant = config.invariant, .deterministic = config.deterministic},
                          globals.threads);
}

std::int64_t machine_memory() {
  const long pages = sysconf(_SC_PHYS_PAGES);
  const long page = sysconf(_SC_PAGE_SIZE);
  return pages > 0 && page > 0 ? static_cast<std::int64_t>(pages) * page : 0;
}

std::int64_t peak_resident_bytes() {
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
  constexpr std::int64_t kKibibyte = 1024;  // ru_maxrss on Linux
  return usage.ru_maxrss * kKibibyte;
}

}  // namespace fathom::app
