// What GPUs this machine has, as CUDA sees them. Only in builds with FATHOM_CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace fathom::cuda {

struct Device {
  int index = 0;
  std::string name;
  int major = 0;  // compute capability
  int minor = 0;
  std::int64_t memory_bytes = 0;
  double memory_gb_per_s = 0;  // what the memory's clock and width allow
  int multiprocessors = 0;
  std::string uuid = {};  // the same for every process that sees this GPU, whatever number it has there
};

struct DeviceReport {
  std::vector<Device> devices;
  int driver_version = 0;   // the newest CUDA that the driver serves: 1000 * major + 10 * minor; 0: no driver
  int runtime_version = 0;  // the CUDA that this program was linked with
};

struct Proof {
  std::int64_t free_bytes = 0;  // of the device's memory, beside what this program has begun to use
};

/// What this build has code for, as CMake names it: "80-real 90a-real".
const char* built_architectures();

/// "13.0" of 13000, as CUDA counts versions.
std::string version_text(int version);

/// Every GPU, as the driver describes it: no context is made on any, and the current device stays. The
/// runtime is linked statically, so a program that calls this starts without a GPU and without a driver.
/// UserError: no driver, a driver older than the runtime, or no device.
DeviceReport query_devices();

/// Runs one kernel on the device, so that what this build has no code for, a GPU that another program has for
/// itself, and one whose memory is all taken, is found out before work begins (UserError). The current device
/// stays.
Proof prove_device(const Device& device);

}  // namespace fathom::cuda
