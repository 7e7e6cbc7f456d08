// Memory by tag: what is in use, its peaks, and blocks that are used again.
#include "src/core/allocator.h"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "kernels/own_memory.h"
#include "tests/forwarding_backend.h"

namespace fathom {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

std::size_t tag(MemoryTag t) { return static_cast<std::size_t>(t); }

class AllocatorTest : public ::testing::Test {
 protected:
  Allocator allocator_{make_cpu_backend({}, 1)};
};

TEST_F(AllocatorTest, ReusesABlockOfTheSameSize) {
  const void* first = nullptr;
  {
    const Storage block = allocator_.allocate(5000, MemoryTag::Activations);
    first = block.get();
    EXPECT_EQ(allocator_.use().cached, 0U);
  }
  EXPECT_GE(allocator_.use().cached, 5000U);
  const Storage smaller = allocator_.allocate(100, MemoryTag::Activations);
  EXPECT_NE(smaller.get(), first);
  const Storage again = allocator_.allocate(4990, MemoryTag::Data);  // rounds to the same size
  EXPECT_EQ(again.get(), first);
  EXPECT_EQ(allocator_.use().cached, 0U);
}

TEST_F(AllocatorTest, WastesAtMostAnEighth) {
  for (std::size_t bytes = 1; bytes < (std::size_t{1} << 20); bytes = bytes * 5 / 4 + 1) {
    const Storage block = allocator_.allocate(bytes, MemoryTag::Data);
    EXPECT_GE(allocator_.use().total_now, bytes);
    EXPECT_LE(allocator_.use().total_now, std::max<std::size_t>(256, bytes + bytes / 8 + 1)) << bytes;
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(block.get()) % 64, 0U);
  }
}

TEST_F(AllocatorTest, CountsByTag) {
  Storage a = allocator_.allocate(1024, MemoryTag::Parameters);
  const Storage b = allocator_.allocate(2048, MemoryTag::Activations);
  EXPECT_EQ(allocator_.use().now[tag(MemoryTag::Parameters)], 1024U);
  EXPECT_EQ(allocator_.use().now[tag(MemoryTag::Activations)], 2048U);
  EXPECT_EQ(allocator_.use().now[tag(MemoryTag::Workspace)], 0U);
  EXPECT_EQ(allocator_.use().total_now, 3072U);
  const Storage copy = a;
  a.reset();
  EXPECT_EQ(allocator_.use().total_now, 3072U) << "a copy still holds it";
}

TEST_F(AllocatorTest, KeepsPeaksUntilTheyAreReset) {
  {
    const Storage a = allocator_.allocate(4096, MemoryTag::Activations);
    const Storage b = allocator_.allocate(1024, MemoryTag::Workspace);
  }
  const Storage c = allocator_.allocate(2048, MemoryTag::Workspace);
  MemoryUse use = allocator_.use();
  EXPECT_EQ(use.total_now, 2048U);
  EXPECT_EQ(use.total_peak, 5120U);
  EXPECT_EQ(use.peak[tag(MemoryTag::Activations)], 4096U);
  EXPECT_EQ(use.peak[tag(MemoryTag::Workspace)], 2048U);
  allocator_.reset_peak();
  use = allocator_.use();
  EXPECT_EQ(use.total_peak, 2048U);
  EXPECT_EQ(use.peak[tag(MemoryTag::Activations)], 0U);
  EXPECT_EQ(use.peak[tag(MemoryTag::Workspace)], 2048U);
}

TEST_F(AllocatorTest, GivesTheCacheBack) {
  allocator_.allocate(4096, MemoryTag::Activations);
  EXPECT_EQ(allocator_.use().cached, 4096U);
  allocator_.release_cache();
  EXPECT_EQ(allocator_.use().cached, 0U);
}

TEST(AllocatorLifetime, BlocksOutliveTheirAllocator) {
  Storage block;
  {
    Allocator allocator(make_cpu_backend({}, 1));
    block = allocator.allocate(64, MemoryTag::Data);
  }
  static_cast<char*>(block.get())[63] = 1;  // under the address sanitizer: still there
}

// A device of 1 MiB whose ops take memory of their own.
class SmallDevice final : public testing_support::ForwardingBackend, public OwnMemory {
 public:
  SmallDevice() : ForwardingBackend(make_cpu_backend({}, 1)) {}
  std::int64_t memory_bytes() const override { return kBytes; }
  std::int64_t free_memory_bytes() const override { return free_; }
  std::int64_t workspace_bytes() const override { return own_; }
  void* allocate(std::size_t bytes) override {
    if (static_cast<std::int64_t>(bytes) > free_) throw std::bad_alloc();
    free_ -= static_cast<std::int64_t>(bytes);
    return inner().allocate(bytes);
  }
  void release(void* data, std::size_t bytes) noexcept override {
    free_ += static_cast<std::int64_t>(bytes);
    inner().release(data, bytes);
  }
  /// What an op does.
  void* take(std::size_t bytes) {
    void* data = allocate_own(*this, bytes);
    own_ += static_cast<std::int64_t>(bytes);
    return data;
  }

 private:
  static constexpr std::int64_t kBytes = 1 << 20;
  std::int64_t free_ = kBytes, own_ = 0;
};

constexpr std::size_t kHalf = 1U << 19;

TEST(OpsOwnMemory, ComesFromTheCacheWhenTheDeviceIsFull) {
  const auto device = std::make_shared<SmallDevice>();
  Allocator allocator(device);
  const Storage kept = allocator.allocate(kHalf, MemoryTag::Parameters);
  allocator.allocate(kHalf, MemoryTag::Activations);  // it is cached now
  ASSERT_EQ(device->free_memory_bytes(), 0);
  void* data = device->take(kHalf / 2);
  EXPECT_EQ(allocator.use().cached, 0U);
  EXPECT_EQ(device->free_memory_bytes(), static_cast<std::int64_t>(kHalf / 2));
  device->release(data, kHalf / 2);
}

TEST(OpsOwnMemory, PoolsKeepTheirsAndTheMessageSaysWhoHasWhat) {
  const auto device = std::make_shared<SmallDevice>();
  Allocator allocator(device);
  Allocator pool = allocator.pool();
  const Storage kept = allocator.allocate(kHalf, MemoryTag::Parameters);
  pool.allocate(kHalf / 2, MemoryTag::Activations);  // a captured step may hold its address
  void* data = device->take(kHalf / 4);
  try {
    device->take(kHalf);
    ADD_FAILURE();
  } catch (const MemoryError& e) {
    EXPECT_THAT(e.what(), AllOf(HasSubstr("512 KiB more for workspace"), HasSubstr("parameters 512 KiB"),
                                HasSubstr("256 KiB cached; ops' own 128 KiB"),
                                HasSubstr("has 1.0 MiB, of which 128 KiB are free")));
  }
  EXPECT_EQ(allocator.use().cached, kHalf / 2);
  device->release(data, kHalf / 4);
}

TEST(OpsOwnMemory, ADeviceWhoseAllocatorIsGoneRefuses) {
  const auto device = std::make_shared<SmallDevice>();
  { const Allocator allocator(device); }
  EXPECT_THROW(device->take(3 * kHalf), std::bad_alloc);
}

}  // namespace
}  // namespace fathom
