// What is said of a GPU that cannot be used: one paragraph with what is there, and what to do. Needs no GPU.
#include "kernels/cuda/device_errors.h"

#include <cstdlib>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace fathom::kernel_test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string listing(cudaError_t code) { return cuda::cannot_list(code, 12020, 13000).what(); }

std::string use(cudaError_t code, int major = 8, int minor = 0) {
  const cuda::Device device{.index = 1,
                            .name = "NVIDIA A100",
                            .major = major,
                            .minor = minor,
                            .memory_bytes = std::int64_t{40} << 30};
  return cuda::cannot_use(code, device, "run a kernel on", "86-real 90a-real").what();
}

TEST(CudaDeviceErrors, AnOldDriverIsNamedBesideTheBuild) {
  EXPECT_THAT(listing(cudaErrorInsufficientDriver),
              AllOf(HasSubstr("serves CUDA 12.2"), HasSubstr("CUDA 13.0"), HasSubstr("Update the driver"),
                    HasSubstr("CPU")));
}

TEST(CudaDeviceErrors, HiddenGpusAreNamedByWhatHidesThem) {
  setenv("CUDA_VISIBLE_DEVICES", "-1", 1);
  EXPECT_THAT(listing(cudaErrorNoDevice), HasSubstr("CUDA_VISIBLE_DEVICES, which is '-1'"));
  unsetenv("CUDA_VISIBLE_DEVICES");
  EXPECT_THAT(listing(cudaErrorNoDevice), AllOf(HasSubstr("container"), Not(HasSubstr("VISIBLE"))));
}

TEST(CudaDeviceErrors, AnArchitectureWithoutCodeIsToldHowToGetIt) {
  EXPECT_THAT(use(cudaErrorNoKernelImageForDevice),
              AllOf(HasSubstr("GPU 1 (NVIDIA A100, compute capability 8.0)"),
                    HasSubstr("only for 86-real 90a-real"), HasSubstr("-DCMAKE_CUDA_ARCHITECTURES=80-real")));
  EXPECT_THAT(use(cudaErrorNoKernelImageForDevice, 9, 0), HasSubstr("ARCHITECTURES=90a-real"));
}

TEST(CudaDeviceErrors, ABusyGpuIsNoFaultOfTheBuild) {
  for (const cudaError_t code : {cudaErrorMemoryAllocation, cudaErrorDevicesUnavailable}) {
    EXPECT_THAT(use(code), AllOf(HasSubstr("GPU 1"), HasSubstr("nvidia-smi"), HasSubstr("--device cuda:N"),
                                 Not(HasSubstr("ARCHITECTURES"))));
  }
  EXPECT_THAT(use(cudaErrorMemoryAllocation), HasSubstr("40.0 GiB"));
}

TEST(CudaDeviceErrors, AnyOtherFailureKeepsCudasOwnWords) {
  EXPECT_THAT(use(cudaErrorECCUncorrectable),
              AllOf(HasSubstr("run a kernel on GPU 1"), HasSubstr("cudaErrorECCUncorrectable"),
                    HasSubstr("nvidia-smi")));
  EXPECT_THAT(listing(cudaErrorSystemNotReady), HasSubstr("cudaErrorSystemNotReady"));
}

TEST(CudaDeviceErrors, TheBuildKnowsItsArchitectures) {
  EXPECT_THAT(cuda::built_architectures(), Not(::testing::StrEq("")));
  EXPECT_EQ(cuda::version_text(13000), "13.0");
  EXPECT_EQ(cuda::version_text(12040), "12.4");
}

}  // namespace
}  // namespace fathom::kernel_test
