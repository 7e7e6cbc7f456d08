// The devices that tests run on: the CPU, and in builds with CUDA the first GPU.
//
// Without a GPU a test of one is skipped, and says why. FATHOM_REQUIRE_GPU=1 in the environment makes that a
// failure: for machines whose GPU should be found.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/backend.h"
#include "kernels/error.h"
#ifdef FATHOM_CUDA
#include "kernels/cuda/make.h"
#endif

namespace fathom::testing_support {

enum class Device : std::uint8_t { Cpu, Cuda };

inline const char* name_of(Device d) { return d == Device::Cpu ? "cpu" : "cuda"; }
inline void PrintTo(Device d, std::ostream* out) { *out << name_of(d); }

/// Those that this build has code for.
inline std::vector<Device> devices() {
#ifdef FATHOM_CUDA
  return {Device::Cpu, Device::Cuda};
#else
  return {Device::Cpu};
#endif
}

struct OpenedDevice {
  std::shared_ptr<Backend> backend;  // null: the device is not there
  std::string why_not;
};

inline OpenedDevice open_device(Device device, const BackendOptions& options = {}) {
  constexpr int kThreads = 2;
  if (device == Device::Cpu) return {make_cpu_backend(options, kThreads), ""};
#ifdef FATHOM_CUDA
  try {
    return {make_cuda_backend(options, 0), ""};
  } catch (const UserError& e) {
    return {nullptr, e.what()};
  }
#else
  return {nullptr, "This build is without CUDA."};
#endif
}

/// For a fixture's SetUp: ends the test when `opened` has no backend.
inline void skip_without(const OpenedDevice& opened) {
  if (opened.backend) return;
  if (std::getenv("FATHOM_REQUIRE_GPU") != nullptr) FAIL() << opened.why_not;
  GTEST_SKIP() << opened.why_not;
}

/// A fixture whose tests need a GPU. `Base` is ::testing::Test or a TestWithParam.
template <typename Base>
class OnCuda : public Base {
 protected:
  void SetUp() override {
    const OpenedDevice opened = open_device(Device::Cuda);
    skip_without(opened);
    cuda_ = opened.backend;
  }
  Backend& cuda() const { return *cuda_; }
  const std::shared_ptr<Backend>& shared_cuda() const { return cuda_; }

 private:
  std::shared_ptr<Backend> cuda_;
};

}  // namespace fathom::testing_support
