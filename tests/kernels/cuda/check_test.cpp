// Which of CUDA's errors end the process's use of the device, and what is said of them. Needs no GPU.
#include "kernels/cuda/check.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace fathom::kernel_test {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(CudaCheck, SuccessSaysNothing) { EXPECT_NO_THROW(cuda::check(cudaSuccess, "swiglu")); }

TEST(CudaCheck, AFaultLosesTheDeviceAndNamesTheOp) {
  for (const cudaError_t code :
       {cudaErrorIllegalAddress, cudaErrorMisalignedAddress, cudaErrorInvalidAddressSpace, cudaErrorInvalidPc,
        cudaErrorIllegalInstruction, cudaErrorHardwareStackError, cudaErrorAssert, cudaErrorLaunchTimeout,
        cudaErrorLaunchFailure, cudaErrorECCUncorrectable, cudaErrorNvlinkUncorrectable, cudaErrorContained,
        cudaErrorTensorMemoryLeak, cudaErrorMpsClientTerminated, cudaErrorExternalDevice}) {
    try {
      cuda::check(code, "swiglu_forward");
      ADD_FAILURE() << cudaGetErrorName(code);
    } catch (const DeviceError& e) {
      EXPECT_THAT(e.what(), AllOf(HasSubstr("[swiglu_forward]"), HasSubstr(cudaGetErrorName(code))));
    }
  }
}

TEST(CudaCheck, AMistakeOfOursLeavesTheDevice) {
  for (const cudaError_t code :
       {cudaErrorInvalidValue, cudaErrorInvalidConfiguration, cudaErrorLaunchOutOfResources}) {
    try {
      cuda::check(code, "swiglu_forward");
      ADD_FAILURE() << cudaGetErrorName(code);
    } catch (const DeviceError& e) {
      ADD_FAILURE() << e.what();
    } catch (const InternalError& e) {
      EXPECT_THAT(e.what(), HasSubstr("[swiglu_forward]"));
    }
  }
}

TEST(CudaCheck, NoMemoryIsTheUsersToMend) {
  try {
    cuda::check(cudaErrorMemoryAllocation, "the step");
    ADD_FAILURE();
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), AllOf(HasSubstr("Out of memory"), HasSubstr("train.micro_batch")));
  }
}

}  // namespace
}  // namespace fathom::kernel_test
