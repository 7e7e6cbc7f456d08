// The limits of control groups, read from a folder that is laid out as a system's root.
#include "src/core/memory_limit.h"

#include <filesystem>

#include <gtest/gtest.h>

#include "tests/io/temp.h"

namespace fathom {
namespace {

constexpr std::int64_t kMiB = 1 << 20;

class MemoryLimit : public ::testing::Test {
 protected:
  void write(const std::string& name, const std::string& text) const {
    std::filesystem::create_directories(std::filesystem::path(root / name).parent_path());
    testing::write_bytes(root / name, text);
  }
  std::int64_t limit() const { return memory_limit(root.path()); }

  testing::TempFolder root;
};

TEST_F(MemoryLimit, NothingThereIsNone) {
  EXPECT_EQ(limit(), 0);
  write("proc/self/cgroup", "0::/user.slice/a\n");
  EXPECT_EQ(limit(), 0);
  EXPECT_EQ(memory_limit("/nowhere"), 0);
  EXPECT_GE(memory_limit(), 0);
}

TEST_F(MemoryLimit, VersionTwo) {
  write("proc/self/cgroup", "0::/user.slice/job: 1\n");
  write("sys/fs/cgroup/user.slice/job: 1/memory.max", "536870912\n");
  EXPECT_EQ(limit(), 512 * kMiB);
  write("sys/fs/cgroup/user.slice/other/memory.max", "1048576\n");  // of another group
  EXPECT_EQ(limit(), 512 * kMiB);
  write("sys/fs/cgroup/user.slice/memory.max", "268435456\n");
  EXPECT_EQ(limit(), 256 * kMiB) << "a group has no more than the one that it lies in";
  write("sys/fs/cgroup/user.slice/memory.max", "max\n");
  EXPECT_EQ(limit(), 512 * kMiB);
  write("sys/fs/cgroup/user.slice/job: 1/memory.max", "max\n");
  EXPECT_EQ(limit(), 0);
}

TEST_F(MemoryLimit, VersionOne) {
  write("proc/self/cgroup", "9:cpu,memory:/docker/abc\n3:cpuset:/small\n1:name=memory:/small\n");
  write("sys/fs/cgroup/memory/small/memory.limit_in_bytes", "4096\n");  // not of the memory controller
  write("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "1073741824\n");
  write("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(limit(), 1024 * kMiB);
  write("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "9223372036854771712\n");
  EXPECT_EQ(limit(), 0);
}

// The path is the one outside of the container, in which its group is the mount.
TEST_F(MemoryLimit, InAContainer) {
  write("sys/fs/cgroup/memory.max", "268435456\n");
  for (const char* group : {"0::/\n", "0::/kubepods/pod7/c1\n", "0::/../../c1\n"}) {
    SCOPED_TRACE(group);
    write("proc/self/cgroup", group);
    EXPECT_EQ(limit(), 256 * kMiB);
  }
  write("proc/self/cgroup", "4:memory:/docker/abc\n");
  EXPECT_EQ(limit(), 0);
  write("sys/fs/cgroup/memory/memory.limit_in_bytes", "134217728\n");
  EXPECT_EQ(limit(), 128 * kMiB);
}

TEST_F(MemoryLimit, BothVersionsAtOnceTheLeastCounts) {
  write("proc/self/cgroup", "4:memory:/a\n0::/b\n");
  write("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "536870912\n");
  write("sys/fs/cgroup/unified/b/memory.max", "268435456\n");
  EXPECT_EQ(limit(), 256 * kMiB);
  write("sys/fs/cgroup/unified/b/memory.max", "1073741824\n");
  EXPECT_EQ(limit(), 512 * kMiB);
}

TEST_F(MemoryLimit, WhatIsNoNumberIsNoLimit) {
  for (const char* text : {"", "\n", "-1\n", "0\n", "12k\n", "99999999999999999999\n"}) {
    SCOPED_TRACE(text);
    write("proc/self/cgroup", "no colons\n:\n0::/\n");
    write("sys/fs/cgroup/memory.max", text);
    EXPECT_EQ(limit(), 0);
  }
}

}  // namespace
}  // namespace fathom
