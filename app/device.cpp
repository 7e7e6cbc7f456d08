#include "app/device.h"

#include <algorithm>
#include <charconv>
#ifdef FATHOM_CUDA
#include <cstdlib>
#include <filesystem>
#include <system_error>
#endif
#include <string_view>
#include <thread>

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <sys/resource.h>
#include <unistd.h>

#include "kernels/cpu/host.h"
#ifdef FATHOM_CUDA
#include "kernels/cuda/device_query.h"
#include "kernels/cuda/make.h"
#endif
#include "kernels/error.h"
#include "src/core/memory_limit.h"

namespace fathom::app {

namespace {

// Whether `auto` finds a GPU, and what to say when it does not.
struct GpuAnswer {
  bool has_driver = false;  // so that one may be expected
  std::string why_not;      // empty: GPU 0 can be used
};

#ifdef FATHOM_CUDA
bool gpus_are_hidden() {
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  return visible != nullptr && (std::string_view(visible).empty() || std::string_view(visible) == "-1");
}

GpuAnswer ask_for_gpu() {
  GpuAnswer answer;
  try {
    const cuda::DeviceReport report = cuda::query_devices();
    answer.has_driver = true;
    if (report.devices.empty()) {
      answer.why_not = "CUDA lists no GPU.";
    } else {
      cuda::prove_device(report.devices.front());
    }
  } catch (const UserError& e) {
    answer.why_not = e.what();
    std::error_code error;
    answer.has_driver |= std::filesystem::exists("/proc/driver/nvidia/version", error);
  }
  answer.has_driver &= !gpus_are_hidden();  // then none is expected
  return answer;
}
#else
GpuAnswer ask_for_gpu() {
  return {.has_driver = false, .why_not = "this build computes on the CPU only (docs/cuda.md)."};
}
#endif

// What the user asked for: the flag, or else the config.
const std::string& device_of(const Globals& globals, const Config& config) {
  return globals.device == "auto" ? config.device : globals.device;
}

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
  std::string device = device_of(globals, config);
  const BackendOptions options{.invariant = config.invariant, .deterministic = config.deterministic};
  if (device == "auto") {
    const GpuAnswer gpu = ask_for_gpu();
    device = gpu.why_not.empty() ? "cuda" : "cpu";
    if (gpu.has_driver && !gpu.why_not.empty()) {
      spdlog::warn("Warning: there is a GPU's driver, but the CPU computes: {}", gpu.why_not);
    }
  }
  if (device.starts_with("cuda")) {
    // What stays with the host, such as a quantizer's factorizations, has the threads that it has without a
    // GPU.
    const auto all = static_cast<int>(std::thread::hardware_concurrency());
    cpu::set_threads(globals.threads > 0 ? globals.threads : all);
    return open_gpu(device, options);
  }
  if (device != "cpu") {
    throw UsageError(fmt::format("--device {} is not a device.", device),
                     "Expected cpu, cuda, cuda:N or auto.");
  }
  return make_cpu_backend(options, globals.threads);
}

void require_precision(const Backend& backend, const PrecisionChoice& choice, const Globals& globals,
                       const Config& config) {
  if (!backend.is_cpu() || choice.value == "fp32") return;
  std::string message =
      fmt::format("{} is {}, which the CPU does not compute in.", choice.name, choice.value);
  if (device_of(globals, config) == "auto") message += " No GPU is used: " + ask_for_gpu().why_not;
  throw UsageError(message, fmt::format("Use {}, or a GPU (--device cuda).", choice.way_out));
}

void require_head_dim(const Backend& backend, const std::string& what, std::int64_t head_dim) {
  const std::int64_t most = backend.most_head_dim();
  if (most == 0 || head_dim <= most) return;
  throw UsageError(fmt::format("{} gives heads of {}, and {} takes heads up to {}.", what, head_dim,
                               backend.description(), most),
                   "Use smaller heads, or the CPU (--device cpu).");
}

std::shared_ptr<Backend> open_training_backend(const Globals& globals, const Config& config) {
  std::shared_ptr<Backend> backend = open_backend(globals, config);
  require_precision(*backend, {"train.precision", config.train.precision, "--set train.precision=fp32"},
                    globals, config);
  require_head_dim(*backend, config.model.own_head_dim > 0 ? "model.head_dim" : "model.heads",
                   config.model.head_dim());
  return backend;
}

DType compute_dtype(const Backend& backend, const Config& config) {
  return !backend.is_cpu() && config.train.precision == "bf16" ? DType::BF16 : DType::F32;
}

std::int64_t machine_memory() {
  const long pages = sysconf(_SC_PHYS_PAGES);
  const long page = sysconf(_SC_PAGE_SIZE);
  const std::int64_t all = pages > 0 && page > 0 ? static_cast<std::int64_t>(pages) * page : 0;
  const std::int64_t limit = memory_limit();
  return all > 0 && limit > 0 ? std::min(all, limit) : std::max(all, limit);
}

std::int64_t peak_resident_bytes() {
  rusage usage{};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return 0;
  constexpr std::int64_t kKibibyte = 1024;  // ru_maxrss on Linux
  return usage.ru_maxrss * kKibibyte;
}

}  // namespace fathom::app
