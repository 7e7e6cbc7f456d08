// Kernels on host data: buffers go to a device, an op runs on their views, and they come back.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "tests/devices.h"
#include "tests/kernels/kernel_suite.h"

namespace fathom::kernel_test {

/// Memory of a device with the contents of a Buffer.
class DeviceBuffer {
 public:
  DeviceBuffer(Backend& backend, Buffer host) : backend_(backend), host_(std::move(host)) {
    data_ = backend_.allocate(host_.bytes().size());
    backend_.copy_from_host(data_, host_.view().data, bytes());
  }
  ~DeviceBuffer() { backend_.release(data_, host_.bytes().size()); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  View view() const { return {data_, host_.size(), host_.dtype()}; }
  Buffer read() {
    backend_.copy_to_host(host_.view().data, data_, bytes());
    return host_;
  }

 private:
  std::size_t bytes() const { return static_cast<std::size_t>(host_.size()) * size_of(host_.dtype()); }

  Backend& backend_;
  Buffer host_;
  void* data_ = nullptr;
};

using Op = std::function<void(Backend&, const std::vector<View>&)>;

/// The buffers as `op` leaves them; it gets their views in the order given.
inline std::vector<Buffer> run_on(Backend& backend, const std::vector<Buffer>& buffers, const Op& op) {
  std::vector<std::unique_ptr<DeviceBuffer>> there;
  std::vector<View> views;
  for (const Buffer& b : buffers) {
    there.push_back(std::make_unique<DeviceBuffer>(backend, b));
    views.push_back(there.back()->view());
  }
  op(backend, views);
  std::vector<Buffer> after;
  for (const auto& b : there) after.push_back(b->read());
  return after;
}

/// A GPU beside the CPU.
class CudaKernels : public testing_support::OnCuda<::testing::Test> {
 protected:
  /// Runs `op` on both, on the GPU twice, and expects the GPU's results to be the CPU's, element by element
  /// to `relative` of its size, and the same bits each time.
  void expect_as_on_the_cpu(const std::vector<Buffer>& buffers, const Op& op, double relative) {
    const std::vector<Buffer> exact = run_on(*cpu_, buffers, op);
    const std::vector<Buffer> ours = run_on(cuda(), buffers, op);
    const std::vector<Buffer> again = run_on(cuda(), buffers, op);
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      SCOPED_TRACE("buffer " + std::to_string(i));
      EXPECT_EQ(ours[i].bytes(), again[i].bytes());
      expect_near(ours[i], exact[i], relative);
    }
  }

  static void expect_near(const Buffer& ours, const Buffer& exact, double relative) {
    ASSERT_EQ(ours.size(), exact.size());
    for (std::int64_t i = 0; i < ours.size(); ++i) {
      if (std::isnan(exact[i])) {
        ASSERT_TRUE(std::isnan(ours[i])) << "[" << i << "] is " << ours[i];
      } else if (ours[i] != exact[i]) {
        ASSERT_TRUE(std::isfinite(exact[i])) << "[" << i << "] is " << ours[i] << ", not " << exact[i];
        ASSERT_NEAR(ours[i], exact[i], relative * std::fabs(exact[i])) << "[" << i << "] of " << ours.size();
      }
    }
  }

  Backend& cpu() const { return *cpu_; }

 private:
  std::unique_ptr<Backend> cpu_ = make_cpu_backend({}, 2);
};

}  // namespace fathom::kernel_test
