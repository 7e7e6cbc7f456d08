// kill -9 at random moments of a run that writes checkpoints all the time. FATHOM_KILLS says how many (8 by
// default; 200 for the real thing), FATHOM_KILL_SEED which moments.
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <random>
#include <thread>

#include <gtest/gtest.h>
#include <sys/stat.h>

#include "src/io/token_store.h"
#include "src/model/checkpoint.h"
#include "tests/system/cli.h"
#include "train/run_folder.h"

namespace fathom {
namespace {

using testing::Background;
using testing::expect_same_run;
using testing::Experiment;

int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoi(text) : otherwise;
}

struct Tally {
  int kills = 0;
  int at_start = 0;       // before this start's first step
  int in_checkpoint = 0;  // a half-written file was left
  int runs = 0;
  std::int64_t most_lost = 0;  // steps
};

class Kill : public ::testing::Test {
 protected:
  static constexpr std::int64_t kEvery = 3;  // steps between checkpoints

  // What a killed run left behind must be whole, and recent.
  void inspect(const std::string& run, std::int64_t resumed_at) {
    std::int64_t saved = 0;
    for (const CheckpointFile& file : list_checkpoints(e / run)) {
      ASSERT_NO_THROW(EXPECT_EQ(read_checkpoint_meta(file.path).state.step, file.step)) << file.path;
      saved = file.step;
    }
    std::error_code error;
    for (const auto& entry : std::filesystem::directory_iterator(e / (run + "/checkpoints"), error)) {
      if (entry.path().filename().string().find(".tmp") != std::string::npos) ++tally.in_checkpoint;
    }
    if (!std::filesystem::exists(e / (run + "/metrics.jsonl"))) return;
    const Metrics metrics = e.metrics(run);
    const std::int64_t logged = metrics.steps.empty() ? 0 : metrics.steps.back().step;
    EXPECT_LE(logged - saved, kEvery) << run << ": logged to " << logged << ", saved at " << saved;
    EXPECT_GE(saved, resumed_at);
    tally.most_lost = std::max(tally.most_lost, logged - saved);
    tally.at_start += logged <= resumed_at ? 1 : 0;
  }

  Experiment e;
  Tally tally;
};

TEST_F(Kill, AtRandomMomentsLosesOnlyTheStepsSinceTheLastCheckpoint) {
  const int kills = setting("FATHOM_KILLS", 8);
  const int seed = setting("FATHOM_KILL_SEED", 1);
  const std::string more = "--set train.steps=250 --set train.eval_every=25 --set train.checkpoint_every=" +
                           std::to_string(kEvery);
  e.trained("mod", "whole", more);
  std::mt19937 random(static_cast<unsigned>(seed));
  std::uniform_int_distribution<int> after_ms(0, 250);
  while (tally.kills < kills && !HasFailure()) {
    const std::string run = "run" + std::to_string(tally.runs++);
    bool done = false;
    while (tally.kills < kills && !done && !HasFailure()) {
      const std::int64_t resumed_at =
          list_checkpoints(e / run).empty() ? 0 : list_checkpoints(e / run).back().step;
      Background training(e, Experiment::train("mod", run, more));
      std::this_thread::sleep_for(std::chrono::milliseconds(after_ms(random)));
      if (training.running()) training.signal(SIGKILL);
      const testing::Outcome outcome = training.wait();
      done = outcome.status == 0;
      ASSERT_TRUE(done || outcome.status == -SIGKILL) << outcome.status << " " << outcome.err;
      if (!done) ++tally.kills;
      inspect(run, resumed_at);
    }
    e.trained("mod", run, more);
    expect_same_run(e, "whole", run);
    std::filesystem::remove_all(e / run);
  }
  std::cout << tally.kills << " kills over " << tally.runs << " runs (seed " << seed
            << "): " << tally.at_start << " before a first step, " << tally.in_checkpoint
            << " within a checkpoint's writing; at most " << tally.most_lost
            << " steps lost, checkpoints every " << kEvery << "\n";
  EXPECT_EQ(tally.kills, kills);
}

// The moment that matters lies between the names of the two stores, so the kill comes as soon as one changes.
TEST(KillPrepare, NeverLeavesTheStoresOfTwoRunsBesideEachOther) {
  const Experiment e;
  const std::string train = e / "train.h5", valid = e / "train.valid.h5";
  const auto inode = [](const std::string& path) {
    struct stat status {};
    return ::stat(path.c_str(), &status) == 0 ? status.st_ino : 0;
  };
  const auto fraction = [](const std::string& path) {
    const std::string recipe = TokenStore::open(path).info().recipe;
    return recipe.substr(recipe.find("valid_fraction="));
  };
  for (const char* next : {"0.3", "0.2", "0.4", "0.15", "0.35", "0.25", "0.45", "0.5"}) {
    const auto before = std::pair(inode(train), inode(valid));
    Background prepare(
        e, std::string("data prepare text.jsonl -o train.h5 --threads 1 --valid-fraction ") + next);
    while (prepare.running() && std::pair(inode(train), inode(valid)) == before) {
    }
    if (prepare.running()) prepare.signal(SIGKILL);
    prepare.wait();
    if (std::filesystem::exists(valid)) {
      EXPECT_EQ(fraction(train), fraction(valid));
    } else {
      testing::expect_refusal(testing::fathom_command(e, Experiment::train("dense", "run")), 1,
                              {"train.valid.h5", "No such file"});
      ASSERT_EQ(testing::fathom_command(e, "data prepare text.jsonl -o train.h5 --valid-fraction 0.1").status,
                0);
    }
  }
}

}  // namespace
}  // namespace fathom
