#include <future>

#include <cuda_runtime_api.h>

#include "kernels/cuda/device_query.h"
#include "kernels/error.h"

namespace fathom::cuda {
namespace {

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

// The user's machine, not our code, is what these calls can fail on.
void check(cudaError_t code, const std::string& what, const std::string& hint) {
  if (code == cudaSuccess) return;
  throw UserError(
      "CUDA could not " + what + ": " + cudaGetErrorString(code) + " (" + cudaGetErrorName(code) + ").",
      hint);
}

__global__ void answer(int* out) { *out = 42; }

// Runs one thread of a kernel on the device and reads its answer back.
void compute_on(int device) {
  const std::string name = "GPU " + std::to_string(device);
  const std::string hint =
      "Build with -DCMAKE_CUDA_ARCHITECTURES set to this GPU's compute capability, such as 90a.";
  check(cudaSetDevice(device), "select " + name, "");
  int* data = nullptr;
  check(cudaMalloc(&data, sizeof(int)), "allocate memory on " + name, "Another process may hold all of it.");
  answer<<<1, 1>>>(data);
  const cudaError_t launched = cudaGetLastError();
  int value = 0;
  const cudaError_t copied =
      launched == cudaSuccess ? cudaMemcpy(&value, data, sizeof(int), cudaMemcpyDeviceToHost) : launched;
  const cudaError_t freed = cudaFree(data);
  check(copied, "run a kernel on " + name, hint);
  check(freed, "free memory on " + name, "");
  if (value != 42)
    throw InternalError("[device_query] " + name + " computed " + std::to_string(value) + ", not 42");
}

// Twice the clock (double data rate) times the width.
double memory_rate(int device, const std::string& name) {
  int kilohertz = 0;
  int bits = 0;
  check(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device), "describe " + name, "");
  check(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device), "describe " + name, "");
  return 2.0 * kilohertz * 1e3 * bits / 8 / 1e9;
}

}  // namespace

DeviceReport query_devices() {
  DeviceReport report;
  check(cudaRuntimeGetVersion(&report.runtime_version), "tell its version", "");
  check(cudaDriverGetVersion(&report.driver_version), "tell the driver's version", "");
  if (report.driver_version == 0) {
    throw UserError(
        "There is no NVIDIA driver on this machine.",
        "Training runs on the CPU; for the GPU, install the driver (nvidia-smi shows whether it works).");
  }
  int count = 0;
  check(cudaGetDeviceCount(&count), "list GPUs",
        "A container must be given its GPU, CUDA_VISIBLE_DEVICES must not hide it, and the driver, which "
        "serves CUDA " +
            version(report.driver_version) + ", must not be older than this build's CUDA, " +
            version(report.runtime_version) + ".");
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    const std::string name = "GPU " + std::to_string(i);
    check(cudaGetDeviceProperties(&properties, i), "describe " + name, "");
    report.devices.push_back({.index = i,
                              .name = properties.name,
                              .major = properties.major,
                              .minor = properties.minor,
                              .memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem),
                              .memory_gb_per_s = memory_rate(i, name),
                              .multiprocessors = properties.multiProcessorCount});
  }
  return report;
}

void prove_device(const Device& device) {
  // The current device belongs to a thread, so what another thread makes current moves nobody's work.
  std::async(std::launch::async, compute_on, device.index).get();
}

}  // namespace fathom::cuda
