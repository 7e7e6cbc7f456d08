#include "train/run_folder.h"

#include <gmock/gmock.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kernels/error.h"
#include "tests/train/test_folder.h"

namespace fathom {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing_support::fresh_folder;
using testing_support::message_of;
using testing_support::read_file;
using testing_support::write_file;

std::vector<std::int64_t> steps_of(const std::vector<CheckpointFile>& files) {
  std::vector<std::int64_t> out;
  for (const CheckpointFile& file : files) out.push_back(file.step);
  return out;
}

TEST(RunFolder, IsCreatedWithItsParentsAndKnowsItsFiles) {
  const auto path = fresh_folder() / "a" / "b";
  const RunFolder run = RunFolder::create_or_open(path);
  EXPECT_TRUE(std::filesystem::is_directory(path / "checkpoints"));
  EXPECT_EQ(run.checkpoint_path(1000), path / "checkpoints" / "step_00001000.h5");
  EXPECT_EQ(run.checkpoint_path(123456789), path / "checkpoints" / "step_123456789.h5");
  EXPECT_FALSE(has_history(run.path()));
  write_file(run.metrics_path(), "{}\n");
  EXPECT_TRUE(has_history(run.path()));
}

TEST(RunFolder, ListsCheckpointsByStepAndIgnoresOtherFiles) {
  const RunFolder run = RunFolder::create_or_open(fresh_folder() / "run");
  for (const std::int64_t step : {300, 20, 123456789, 1000}) write_file(run.checkpoint_path(step), "x");
  for (const char* name :
       {"step_.h5", "step_12x.h5", "notes.h5", "step_-0000001.h5", "step_00000007.h5.tmp3"}) {
    write_file(run.checkpoints_path() / name, "x");
  }
  EXPECT_THAT(steps_of(run.checkpoints()), ElementsAre(20, 300, 1000, 123456789));
}

TEST(RunFolder, PrunesTheOldestButNeverTheLatest) {
  const RunFolder run = RunFolder::create_or_open(fresh_folder() / "run");
  for (const std::int64_t step : {1, 2, 3, 4}) write_file(run.checkpoint_path(step), "x");
  run.prune(0);
  EXPECT_EQ(run.checkpoints().size(), 4u);
  run.set_latest(1);
  EXPECT_EQ(read_file(run.latest_path()), "step_00000001.h5\n");
  run.prune(2);
  EXPECT_THAT(steps_of(run.checkpoints()), ElementsAre(1, 3, 4));
  run.set_latest(4);
  run.prune(2);
  EXPECT_THAT(steps_of(run.checkpoints()), ElementsAre(3, 4));
  run.set_aside(run.checkpoint_path(4));
  EXPECT_THAT(steps_of(run.checkpoints()), ElementsAre(3));
  EXPECT_TRUE(std::filesystem::exists(run.checkpoint_path(4).string() + ".damaged"));
}

TEST(RunFolder, RemovesWhatAKilledRunLeftHalfWritten) {
  const auto path = fresh_folder() / "run";
  { RunFolder::create_or_open(path); }
  write_file(path / "checkpoints" / "step_00000010.h5.tmp123", "half");
  write_file(path / "checkpoints" / "step_00000005.h5", "whole");
  write_file(path / "latest.tmp77", "half");
  write_file(path / "my.tmp.notes", "mine");
  const RunFolder run = RunFolder::create_or_open(path);
  EXPECT_FALSE(std::filesystem::exists(path / "checkpoints" / "step_00000010.h5.tmp123"));
  EXPECT_FALSE(std::filesystem::exists(path / "latest.tmp77"));
  EXPECT_TRUE(std::filesystem::exists(path / "my.tmp.notes"));
  EXPECT_THAT(steps_of(run.checkpoints()), ElementsAre(5));
}

TEST(RunFolder, ASecondTrainingIsRefusedWithTheOwnersPid) {
  const auto path = fresh_folder() / "run";
  {
    const RunFolder run = RunFolder::create_or_open(path);
    EXPECT_THAT(
        message_of<UserError>([&] { RunFolder::create_or_open(path); }),
        AllOf(HasSubstr(path.string()), HasSubstr("another training"), HasSubstr(std::to_string(getpid()))));
  }
  RunFolder::create_or_open(path);  // released with its owner
}

TEST(RunFolder, KillNineReleasesTheLock) {
  const auto path = fresh_folder() / "run";
  int ready[2];
  ASSERT_EQ(pipe(ready), 0);
  const pid_t child = fork();
  if (child == 0) {
    const RunFolder run = RunFolder::create_or_open(path);
    if (write(ready[1], "x", 1) != 1) _exit(1);
    pause();
    _exit(0);
  }
  char byte = 0;
  ASSERT_EQ(read(ready[0], &byte, 1), 1);
  EXPECT_THAT(message_of<UserError>([&] { RunFolder::create_or_open(path); }),
              HasSubstr(std::to_string(child)));
  ASSERT_EQ(kill(child, SIGKILL), 0);
  ASSERT_EQ(waitpid(child, nullptr, 0), child);
  RunFolder::create_or_open(path);
}

TEST(RunFolder, AFileInTheWayIsAUserError) {
  const auto folder = fresh_folder();
  write_file(folder / "file", "x");
  EXPECT_THAT(message_of<UserError>([&] { RunFolder::create_or_open(folder / "file"); }),
              AllOf(HasSubstr("is a file"), HasSubstr((folder / "file").string())));
  EXPECT_THAT(message_of<UserError>([&] { RunFolder::create_or_open(folder / "file" / "run"); }),
              HasSubstr("cannot create"));
}

TEST(RunFolder, AnUnwritableFolderIsAUserError) {
  // /proc refuses new entries even to root.
  EXPECT_THAT(message_of<UserError>([] { RunFolder::create_or_open("/proc/fathom_run"); }),
              AllOf(HasSubstr("cannot create"), HasSubstr("/proc/fathom_run")));
}

TEST(RunFolder, IsToldFromOtherFolders) {
  const auto folder = fresh_folder();
  EXPECT_FALSE(is_run_folder(folder));
  EXPECT_FALSE(is_run_folder(folder / "absent"));
  write_file(folder / "metrics.jsonl", "");
  EXPECT_TRUE(is_run_folder(folder));
  EXPECT_FALSE(is_run_folder(folder / "metrics.jsonl"));
}

}  // namespace
}  // namespace fathom
