// Claims on cells: one owner at a time, gone with its process.
#include <csignal>
#include <cstdlib>
#include <ctime>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "tests/train/test_folder.h"
#include "train/isoflop/claim.h"

namespace fathom::isoflop {
namespace {

using testing_support::fresh_folder;
using testing_support::write_file;

// A child that takes the claim, says so, and waits to be killed.
pid_t holder(const std::filesystem::path& base, int ready) {
  const pid_t pid = ::fork();
  if (pid != 0) return pid;
  const auto claim = Claim::take(base);
  const char byte = claim ? 'y' : 'n';
  if (::write(ready, &byte, 1) != 1) ::_exit(1);
  ::pause();
  ::_exit(0);
}

TEST(Claim, HasOneOwner) {
  const auto base = fresh_folder() / "cell";
  std::optional<Claim> first = Claim::take(base);
  ASSERT_TRUE(first);
  EXPECT_FALSE(Claim::take(base));
  const auto owner = claimed_by(base);
  ASSERT_TRUE(owner);
  EXPECT_NE(owner->text.find(std::to_string(::getpid())), std::string::npos);
  first.reset();
  EXPECT_FALSE(claimed_by(base));
  EXPECT_TRUE(Claim::take(base));
}

TEST(Claim, OfAKilledWorkerIsFreeAtOnce) {
  const auto base = fresh_folder() / "cell";
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t pid = holder(base, ready[1]);
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  ASSERT_EQ(byte, 'y');
  EXPECT_FALSE(Claim::take(base));
  EXPECT_TRUE(claimed_by(base));
  ::kill(pid, SIGKILL);
  ::waitpid(pid, nullptr, 0);
  EXPECT_FALSE(claimed_by(base));  // though its owner's file is still there
  EXPECT_TRUE(std::filesystem::exists(base.string() + ".owner"));
  EXPECT_TRUE(Claim::take(base));
}

// Where flock does not reach across machines, the owner's file and its age decide.
TEST(Claim, OfAnotherMachineStandsUntilItIsStale) {
  const auto base = fresh_folder() / "cell";
  const std::string owner = base.string() + ".owner";
  write_file(owner, "elsewhere 0000\nelsewhere, process 7\n");
  EXPECT_FALSE(Claim::take(base));
  ASSERT_TRUE(claimed_by(base));
  EXPECT_EQ(claimed_by(base)->text, "elsewhere, process 7");
  timespec old[2] = {{::time(nullptr) - 300, 0}, {::time(nullptr) - 300, 0}};
  ASSERT_EQ(::utimensat(AT_FDCWD, owner.c_str(), old, 0), 0);
  EXPECT_FALSE(claimed_by(base));
  EXPECT_TRUE(Claim::take(base));
}

TEST(Claim, IsTouchedWhileItIsHeld) {
  const auto base = fresh_folder() / "cell";
  const std::string owner = base.string() + ".owner";
  const auto claim = Claim::take(base, {.heartbeat_seconds = 0.01, .stale_seconds = 120});
  ASSERT_TRUE(claim);
  timespec old[2] = {{1000, 0}, {1000, 0}};
  ASSERT_EQ(::utimensat(AT_FDCWD, owner.c_str(), old, 0), 0);
  struct stat status {};
  for (int i = 0; i < 500; ++i) {
    ASSERT_EQ(::stat(owner.c_str(), &status), 0);
    if (status.st_mtim.tv_sec > 1000) return;
    ::usleep(10000);
  }
  FAIL() << "not touched in five seconds";
}

}  // namespace
}  // namespace fathom::isoflop
