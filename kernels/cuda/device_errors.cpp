#include "kernels/cuda/device_errors.h"

#include <cstdlib>

#include <fmt/format.h>

namespace fathom::cuda {

namespace {

std::string name_of(cudaError_t code) {
  return fmt::format("{} ({})", cudaGetErrorString(code), cudaGetErrorName(code));
}

std::string name_of(const Device& d) {
  return fmt::format("GPU {} ({}, compute capability {}.{})", d.index, d.name, d.major, d.minor);
}

}  // namespace

const char* built_architectures() { return FATHOM_CUDA_ARCHITECTURES; }

std::string version_text(int version) { return fmt::format("{}.{}", version / 1000, version % 1000 / 10); }

UserError cannot_list(cudaError_t code, int driver_version, int runtime_version) {
  switch (code) {
    case cudaErrorInsufficientDriver:
      return UserError(fmt::format("The NVIDIA driver is too old for this build: it serves CUDA {}, and the "
                                   "build is of CUDA {}.",
                                   version_text(driver_version), version_text(runtime_version)),
                       fmt::format("Update the driver, or build with a CUDA Toolkit of version {} or older; "
                                   "until then only the CPU computes.",
                                   version_text(driver_version)));
    case cudaErrorNoDevice: {
      const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
      return UserError(
          "There is an NVIDIA driver, but no GPU that this program may use.",
          visible != nullptr
              ? fmt::format("CUDA_VISIBLE_DEVICES, which is '{}', may hide it; nvidia-smi lists all.",
                            visible)
              : "A container must be given its GPU (docker run --gpus all); nvidia-smi lists all.");
    }
    default:
      return UserError(fmt::format("CUDA could not list GPUs: {}.", name_of(code)),
                       "nvidia-smi shows whether the driver works.");
  }
}

UserError cannot_use(cudaError_t code, const Device& device, const char* what, const char* architectures) {
  switch (code) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction: {
      const bool hopper = device.major == 9 && device.minor == 0;  // its own instructions want the a
      return UserError(
          fmt::format("This build has no code for {}, only for {}.", name_of(device), architectures),
          fmt::format("Build with -DCMAKE_CUDA_ARCHITECTURES={}{}{}-real (docs/cuda.md).", device.major,
                      device.minor, hopper ? "a" : ""));
    }
    case cudaErrorMemoryAllocation:
      return UserError(fmt::format("{} has no memory left: other programs hold its {:.1f} GiB.",
                                   name_of(device), static_cast<double>(device.memory_bytes) / (1 << 30)),
                       "nvidia-smi lists them. End one, or choose another GPU with --device cuda:N.");
    case cudaErrorDevicesUnavailable:
      return UserError(fmt::format("{} is busy or not available: another program may have it for itself (its "
                                   "compute mode is then exclusive).",
                                   name_of(device)),
                       "nvidia-smi shows both. Wait, or choose another GPU with --device cuda:N.");
    default:
      return UserError(fmt::format("CUDA could not {} {}: {}.", what, name_of(device), name_of(code)),
                       "nvidia-smi shows the state of the GPU.");
  }
}

}  // namespace fathom::cuda
