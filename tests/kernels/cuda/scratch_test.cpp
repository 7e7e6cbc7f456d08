// The memory that ops lend each other. Needs no GPU.
#include "kernels/cuda/scratch.h"

#include <cstdint>
#include <new>

#include <gtest/gtest.h>

namespace fathom::kernel_test {
namespace {

using cuda::Scratch;

// Blocks with an address and a size, and no memory behind.
struct Device {
  std::vector<std::size_t> sizes;
  bool full = false;

  void* operator()(std::size_t bytes) {
    if (full) throw std::bad_alloc();
    sizes.push_back(bytes);
    return reinterpret_cast<void*>(sizes.size());
  }
  std::size_t size_of(void* block) const { return sizes[reinterpret_cast<std::uintptr_t>(block) - 1]; }
};

TEST(CudaScratch, AnOpThatNeedsNoneGetsABlockToo) {
  Scratch scratch;
  Device device;
  EXPECT_NE(scratch.get(0, device), nullptr);  // cuDNN's workspace may be of no bytes
  EXPECT_EQ(device.sizes.size(), 1U);
}

TEST(CudaScratch, GrowsAndKeepsWhatItHad) {
  Scratch scratch;
  Device device;
  void* const first = scratch.get(1000, device);
  EXPECT_EQ(scratch.get(device.size_of(first), device), first);
  void* const second = scratch.get(device.size_of(first) + 1, device);
  EXPECT_NE(second, first);
  EXPECT_GT(device.size_of(second), device.size_of(first));
  EXPECT_EQ(scratch.get(1000, device), second);
  EXPECT_EQ(scratch.blocks().size(), 2U);
  EXPECT_EQ(scratch.held_bytes(), device.size_of(first) + device.size_of(second));
}

TEST(CudaScratch, ARefusalLeavesItAsItWas) {
  Scratch scratch;
  Device device;
  void* const first = scratch.get(1000, device);
  const std::size_t large = 2 * device.size_of(first);
  device.full = true;
  EXPECT_THROW(scratch.get(large, device), std::bad_alloc);
  EXPECT_EQ(scratch.get(1000, device), first);
  device.full = false;  // the next cell of a sweep, on the same backend
  EXPECT_GE(device.size_of(scratch.get(large, device)), large);
}

}  // namespace
}  // namespace fathom::kernel_test
