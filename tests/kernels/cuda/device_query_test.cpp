// Asking about GPUs: what is said, and that nobody's work moves to another GPU by it.
#include "kernels/cuda/device_query.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

class CudaDeviceQuery : public CudaKernels {};

TEST_F(CudaDeviceQuery, LeavesTheCurrentDevice) {
  ASSERT_NE(cuda().description(), "");  // a backend works on GPU 0
  const cuda::DeviceReport report = cuda::query_devices();
  ASSERT_GE(report.devices.size(), 1U);
  for (const cuda::Device& d :
       report.devices) {  // on a machine with several this once made the last one current
    cuda::prove_device(d);
    int current = -1;
    ASSERT_EQ(cudaGetDevice(&current), cudaSuccess);
    EXPECT_EQ(current, 0);
    EXPECT_GT(d.memory_bytes, 0);
    EXPECT_GT(d.multiprocessors, 0);
  }
  Buffer ones(DType::F32, 1000);
  expect_as_on_the_cpu(
      {ones}, [](Backend& b, const std::vector<View>& v) { b.fill(v[0], 3.0); }, 0);
}

}  // namespace
}  // namespace fathom::kernel_test
