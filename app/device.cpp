#include "app/device.h"

#include <charconv>
#include <string_view>

#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#ifdef FATHOM_CUDA
#include "kernels/cuda/device_query.h"
#include "kernels/cuda/make.h"
#endif
#include "kernels/error.h"

namespace fathom::app {

namespace {

#ifdef FATHOM_CUDA
// Whether there is a GPU that this build can use; why not does not matter to `auto`, and doctor tells.
bool gpu_is_there() {
  try {
    const cuda::DeviceReport report = cuda::query_devices();
    if (report.devices.empty()) return false;
    cuda::prove_device(report.devices.front());
    return true;
  } catch (const UserError&) {
    return false;
  }
}
#endif

// N of "cuda:N"; 0 of "cuda".
int gpu_number(const std::string& device) {
  if (device == "cuda") return 0;
  int number = -1;
  const char* end = device.data() + device.size();
  const auto [stop, error] = std::from_chars(device.data() + std::string_view("cuda:").size(), end, number);
  if (!device.starts_with("cuda:") || error != std::errc() || stop != end || number < 0) {
    throw UsageError(fmt::format("--device {} is not a device.", device),
                     "Expected cpu, cuda, cuda:N or auto.");
  }
  return number;
}

std::shared_ptr<Backend> open_gpu(const std::string& device, const BackendOptions& options) {
  const int number = gpu_number(device);
#ifdef FATHOM_CUDA
  try {
    return make_cuda_backend(options, number);
  } catch (const UserError& e) {
    throw UserError(fmt::format("--device {} cannot be used: {}", device, e.what()),
                    "Use --device cpu or auto to compute on the CPU.");
  }
#else
  (void)options;
  throw UserError(
      fmt::format("--device {} asks for GPU {}, and this build computes on the CPU only.", device, number),
      "Build with the preset cuda (docs/cuda.md), or use --device cpu or auto.");
#endif
}

}  // namespace

std::shared_ptr<Backend> open_backend(const Globals& globals, const Config& config) {
  std::string device = globals.device == "auto" ? config.device : globals.device;
  const BackendOptions options{.invariant = config.invariant, .deterministic = config.deterministic};
#ifdef FATHOM_CUDA
  if (device == "auto" && gpu_is_there()) device = "cuda";
#endif
  if (device.starts_with("cuda")) return open_gpu(device, options);
  if (device != "cpu" && device != "auto") {
    throw UsageError(fmt::format("--device {} is not a device.", device),
                     "Expected cpu, cuda, cuda:N or auto.");
  }
  return make_cpu_backend(options, globals.threads);
}

void require_precision(const Backend& backend, const Config& config) {
  if (!backend.is_cpu() || config.train.precision == "fp32") return;
  throw UsageError(
      fmt::format("train.precision is {}, which the CPU does not train in.", config.train.precision),
      "Use --set train.precision=fp32, or a GPU.");
}

DType compute_dtype(const Backend& backend, const Config& config) {
  return !backend.is_cpu() && config.train.precision == "bf16" ? DType::BF16 : DType::F32;
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
