#include <future>
#include <string>

#include <cuda_runtime_api.h>

#include "kernels/cuda/device_errors.h"
#include "kernels/cuda/device_query.h"
#include "kernels/error.h"

namespace fathom::cuda {
namespace {

__global__ void answer(int* out) { *out = 42; }

// Runs one thread of a kernel on the device and reads its answer back.
Proof compute_on(const Device& device) {
  const auto check = [&](cudaError_t code, const char* what) {
    if (code != cudaSuccess) throw cannot_use(code, device, what, built_architectures());
  };
  check(cudaSetDevice(device.index), "select");
  int* data = nullptr;
  check(cudaMalloc(&data, sizeof(int)), "allocate memory on");
  answer<<<1, 1>>>(data);
  const cudaError_t launched = cudaGetLastError();
  int value = 0;
  const cudaError_t copied =
      launched == cudaSuccess ? cudaMemcpy(&value, data, sizeof(int), cudaMemcpyDeviceToHost) : launched;
  const cudaError_t freed = cudaFree(data);
  check(copied, "run a kernel on");
  check(freed, "free memory on");
  if (value != 42) {
    throw InternalError("[device_query] GPU " + std::to_string(device.index) + " computed " +
                        std::to_string(value) + ", not 42");
  }
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "ask for the free memory of");
  return {static_cast<std::int64_t>(free)};
}

// Twice the clock (double data rate) times the width.
double memory_rate(const Device& device) {
  int kilohertz = 0;
  int bits = 0;
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    const cudaError_t code = cudaDeviceGetAttribute(&value, attribute, device.index);
    if (code != cudaSuccess) throw cannot_use(code, device, "describe", built_architectures());
  };
  ask(kilohertz, cudaDevAttrMemoryClockRate);
  ask(bits, cudaDevAttrGlobalMemoryBusWidth);
  return 2.0 * kilohertz * 1e3 * bits / 8 / 1e9;
}

// 32 hexadecimal digits.
std::string text_of(const cudaUUID_t& uuid) {
  std::string text;
  for (const char byte : uuid.bytes) {
    constexpr const char* kDigits = "0123456789abcdef";
    const auto value = static_cast<unsigned char>(byte);
    text += kDigits[value / 16];
    text += kDigits[value % 16];
  }
  return text;
}

}  // namespace

DeviceReport query_devices() {
  DeviceReport report;
  const auto check = [&](cudaError_t code) {
    if (code != cudaSuccess) throw cannot_list(code, report.driver_version, report.runtime_version);
  };
  check(cudaRuntimeGetVersion(&report.runtime_version));
  check(cudaDriverGetVersion(&report.driver_version));
  if (report.driver_version == 0) {
    throw UserError(
        "There is no NVIDIA driver on this machine.",
        "Training runs on the CPU; for the GPU, install the driver (nvidia-smi shows whether it works).");
  }
  int count = 0;
  check(cudaGetDeviceCount(&count));
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, i));
    Device device{.index = i,
                  .name = properties.name,
                  .major = properties.major,
                  .minor = properties.minor,
                  .memory_bytes = static_cast<std::int64_t>(properties.totalGlobalMem),
                  .multiprocessors = properties.multiProcessorCount,
                  .uuid = text_of(properties.uuid)};
    device.memory_gb_per_s = memory_rate(device);
    report.devices.push_back(device);
  }
  return report;
}

Proof prove_device(const Device& device) {
  // The current device belongs to a thread, so what another thread makes current moves nobody's work.
  return std::async(std::launch::async, compute_on, device).get();
}

}  // namespace fathom::cuda
