// Ranks that die, hang, lag, or were started with something else: whoever is left names them and ends, and
// the run goes on from its checkpoint.
#include <chrono>
#include <fstream>
#include <thread>

#include <gtest/gtest.h>
#include <sys/stat.h>

#include "tests/distributed/mpirun.h"
#include "train/comm/host.h"

namespace fathom {
namespace {

using testing::Experiment;
using testing::fathom_command;
using testing::mpirun;
using testing::Outcome;
using testing::Ranked;
using testing::read_bytes;
using testing::wait_until;
using testing::words_of;

class Faults : public ::testing::Test {
 protected:
  void SetUp() override { SKIP_WITHOUT_MPI(); }

  static std::string endless(const std::string& more = "") {
    return Experiment::train("mod", "run", "--set train.steps=100000 --set train.checkpoint_every=5 " + more);
  }
  // One that is not of an earlier start.
  void await_checkpoint(Ranked& run) {
    const std::int64_t before = read_checkpoint(e.newest_checkpoint("run"));
    wait_until([&] { return read_checkpoint(e.newest_checkpoint("run")) > before || !run.running(); },
               "a checkpoint");
    ASSERT_TRUE(run.running());
  }
  // One paragraph of one rank that names another one.
  static void expect_named(const Outcome& outcome, const std::vector<std::string>& words) {
    EXPECT_NE(outcome.status, 0);
    const std::size_t at = outcome.err.find("fathom: Rank ");
    ASSERT_NE(at, std::string::npos) << outcome.err;
    EXPECT_EQ(outcome.err.find("fathom: ", at + 1), std::string::npos) << outcome.err;
    const std::string line = outcome.err.substr(at, outcome.err.find('\n', at) - at);
    for (const std::string& word : words)
      EXPECT_NE(line.find(word), std::string::npos) << word << ": " << line;
  }
  void expect_resumes() {
    Ranked again(e, mpirun(2, words_of(endless())));
    await_checkpoint(again);
    again.signal_rank(1, SIGTERM);
    EXPECT_EQ(again.wait().status, 0);
    EXPECT_NE(read_bytes(e / "run/metrics.jsonl").find("\"event\":\"resume\""), std::string::npos);
  }
  static std::int64_t read_checkpoint(const std::string& path) {
    const std::size_t at = path.rfind("step_");
    return at == std::string::npos ? -1 : std::atoll(path.c_str() + at + 5);
  }

  Experiment e;
};

TEST_F(Faults, AKilledRankIsNamed) {
  Ranked run(e, mpirun(2, words_of(endless())));
  await_checkpoint(run);
  run.signal_rank(1, SIGKILL);
  expect_named(run.wait(), {"Rank 1 (" + host_name(), "ended without a word after step", "--resume auto"});
  expect_resumes();
}

TEST_F(Faults, AKilledRank0IsNamed) {
  Ranked run(e, mpirun(2, words_of(endless())));
  await_checkpoint(run);
  run.signal_rank(0, SIGKILL);
  expect_named(run.wait(), {"Rank 0 (" + host_name(), "ended without a word after step"});
  expect_resumes();
}

TEST_F(Faults, ARankThatHangsIsNamed) {
  for (const int rank : {1, 0}) {
    Ranked run(e, mpirun(2, words_of(endless("--set train.rank_timeout=3"))));
    await_checkpoint(run);
    run.signal_rank(rank, SIGSTOP);
    expect_named(run.wait(),
                 {"Rank " + std::to_string(rank) + " (", "has said nothing for 3 s", "after step"});
  }
  expect_resumes();
}

TEST_F(Faults, ARankThatFailsTellsWhy) {
  // Only the second rank has no training text.
  std::vector<std::string> other = words_of(endless("--set data.train=nowhere.h5"));
  Ranked run(e, mpirun({words_of(endless()), other}));
  expect_named(run.wait(), {"Rank 1 (", "failed before the first step", "nowhere.h5"});
}

TEST_F(Faults, AnotherConfigIsRefused) {
  Ranked run(e, mpirun({words_of(endless()), words_of(endless("--set train.lr=0.002"))}));
  expect_named(run.wait(), {"Rank 1 (", "another config", "train.lr", "0.002"});
  EXPECT_TRUE(e.newest_checkpoint("run").empty());
}

TEST_F(Faults, OtherTextIsRefused) {
  ASSERT_EQ(fathom_command(e, "data synthetic --bytes 60000 --seed 9 -o other.txt").status, 0);
  ASSERT_EQ(fathom_command(e, "data prepare other.txt -o other.h5 --valid-fraction 0.1").status, 0);
  Ranked run(e, mpirun({words_of(endless()), words_of(endless("--set data.train=other.h5"))}));
  expect_named(run.wait(), {"Rank 1 (", "another training text"});
}

TEST_F(Faults, AnotherProgramIsRefused) {
  const std::string copy = e / "fathom-of-another-build";
  testing::write_bytes(copy, read_bytes(FATHOM_BINARY) + " ");
  ASSERT_EQ(::chmod(copy.c_str(), 0755), 0);
  std::vector<std::string> other = words_of(endless());
  other[0] = copy;
  Ranked run(e, mpirun({words_of(endless()), other}));
  expect_named(run.wait(), {"Rank 1 (", "another program"});
}

TEST_F(Faults, ADiskThatRefusesEndsAll) {
  const std::string command = "ulimit -f 40; exec '" FATHOM_BINARY "' " + endless();
  Ranked run(e, mpirun(2, {"sh", "-c", command}));
  const Outcome outcome = run.wait();
  EXPECT_NE(outcome.status, 0);
  EXPECT_NE(outcome.err.find("checkpoints/step_"), std::string::npos) << outcome.err;
  EXPECT_EQ(outcome.err.find("fathom: "), outcome.err.rfind("fathom: ")) << outcome.err;
}

TEST_F(Faults, ASlowRankIsNamed) {
  Ranked run(e, mpirun(2, words_of(endless("--set train.log_every=10"))));
  const auto warned = [&] {
    return read_bytes(e / "run/train.log").find("slow: rank 1 (") != std::string::npos;
  };
  await_checkpoint(run);
  for (int i = 0; i < 600 && !warned() && run.running(); ++i) {
    run.signal_rank(1, SIGSTOP);
    std::this_thread::sleep_for(std::chrono::milliseconds(40));
    run.signal_rank(1, SIGCONT);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  EXPECT_TRUE(warned());
  EXPECT_TRUE(run.running());
}

}  // namespace
}  // namespace fathom
