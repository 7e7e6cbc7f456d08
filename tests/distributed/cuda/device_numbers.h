// fp32 numbers in a device's memory.
#pragma once

#include <vector>

#include "kernels/backend.h"

namespace fathom::testing {

class DeviceNumbers {
 public:
  DeviceNumbers(Backend& backend, const std::vector<float>& values)
      : backend_(backend), size_(values.size()), data_(backend.allocate(bytes())) {
    backend_.copy_from_host(data_, values.data(), bytes());
  }
  ~DeviceNumbers() { backend_.release(data_, bytes()); }
  DeviceNumbers(const DeviceNumbers&) = delete;
  DeviceNumbers& operator=(const DeviceNumbers&) = delete;

  View view() const { return {data_, static_cast<std::int64_t>(size_), DType::F32}; }
  std::vector<float> read() const {
    std::vector<float> values(size_);
    backend_.copy_to_host(values.data(), data_, bytes());
    return values;
  }

 private:
  std::size_t bytes() const { return size_ * sizeof(float); }

  Backend& backend_;
  std::size_t size_;
  void* data_;
};

}  // namespace fathom::testing
