// Memory by tag: what is in use, its peaks, and blocks that are used again.
#include "src/core/allocator.h"

#include <algorithm>
#include <cstdint>

#include <gtest/gtest.h>

namespace fathom {
namespace {

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

}  // namespace
}  // namespace fathom
