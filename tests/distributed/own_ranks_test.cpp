// `fathom train --ranks N` and `--gpus N`: ranks that the program starts itself are one program to whoever
// watches.
#include <chrono>
#include <filesystem>
#include <string>
#include <thread>
#include <utility>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include "tests/distributed/mpirun.h"
#include "tests/distributed/same_course.h"

namespace fathom {
namespace {

using testing::Experiment;
using testing::fathom_command;
using testing::Outcome;
using testing::Ranked;
using testing::wait_until;
using testing::words_of;

class OwnRanks : public ::testing::Test {
 protected:
  static std::string by_two(const std::string& run, const std::string& more = "") {
    return Experiment::train("mod", run, "--ranks 2 " + more);
  }
  static std::string endless(const std::string& run) { return by_two(run, "--set train.steps=1000000"); }

  void await_checkpoint(Ranked& run) {
    wait_until([&] { return !e.newest_checkpoint("run").empty() || !run.running(); }, "a checkpoint");
  }
  std::string recorded() const { return testing::read_bytes(e / "run/metrics.jsonl"); }
  // It stopped behind a step, with a checkpoint, and said so as one program does.
  void expect_stopped(const std::string& signal) {
    EXPECT_EQ(e.lines("run").back().at("status"), "stopped");
    EXPECT_THAT(e.lines("run").back().at("message").get<std::string>(), ::testing::HasSubstr(signal));
    const std::string step = std::to_string(e.metrics("run").steps.back().step);
    EXPECT_NE(e.newest_checkpoint("run").find(step), std::string::npos);
  }

  Experiment e;
};

TEST_F(OwnRanks, MakeTheRunOfOne) {
  e.trained("mod", "one");
  const Outcome outcome = fathom_command(e, by_two("two", "--json"));
  EXPECT_EQ(outcome.json().at("status"), "done");
  EXPECT_THAT(outcome.err, ::testing::HasSubstr("Ranks: 2 ranks by TCP"));
  testing::expect_close(e, "one", "two", 2e-3);
  const Outcome again = fathom_command(e, by_two("two", "--json"));
  EXPECT_EQ(again.json().at("already_done"), true);
  e.trained("mod", "three", "--ranks 1");
  EXPECT_EQ(testing::content(e.newest_checkpoint("one")), testing::content(e.newest_checkpoint("three")));
}

TEST_F(OwnRanks, GradientsAreSentAsBf16) {
  e.trained("mod", "one", "--ranks 2");
  e.trained("mod", "two", "--ranks 2 --set train.reduction=bf16");
  testing::expect_close(e, "one", "two", 2e-2);
  EXPECT_NE(testing::content(e.newest_checkpoint("one")), testing::content(e.newest_checkpoint("two")));
}

TEST_F(OwnRanks, StopTogether) {
  Ranked run(e, words_of(endless("run")));
  await_checkpoint(run);
  run.signal(SIGTERM);
  const Outcome outcome = run.wait();
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  expect_stopped("SIGTERM");
}

TEST_F(OwnRanks, StopWhereTheirStarterIsKilled) {
  Ranked run(e, words_of(endless("run")));
  await_checkpoint(run);
  run.signal(SIGKILL);
  EXPECT_EQ(run.wait().status, -SIGKILL);
  wait_until([&] { return recorded().find("\"event\":\"end\"") != std::string::npos; }, "the end");
  expect_stopped("SIGTERM");
}

// Ranks that do not look after signals yet die of them; nobody takes that for a rank's failure.
TEST_F(OwnRanks, WhoDieOfWhatTheirStarterWasSentEndLikeOneProgram) {
  ASSERT_EQ(::mkfifo((e / "never.yaml").c_str(), 0600), 0);  // a config that they wait for
  for (const int number : {SIGTERM, SIGINT, SIGQUIT}) {
    Ranked run(e, words_of("train never.yaml --run-dir run --ranks 2"));
    for (const int rank : {0, 1}) run.signal_rank(rank, 0);  // they are there
    run.signal(number);
    const Outcome outcome = run.wait();
    EXPECT_EQ(outcome.status, 128 + number);
    EXPECT_EQ(outcome.err, "");
  }
}

TEST_F(OwnRanks, PauseWithTheirStarter) {
  Ranked run(e, words_of(endless("run")));
  await_checkpoint(run);
  run.signal(SIGTSTP);
  // Two looks that see the same: nothing is written any more.
  std::string seen;
  wait_until(
      [&] {
        const std::string before = std::exchange(seen, recorded());
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        return before == seen;
      },
      "a pause");
  run.signal(SIGCONT);
  wait_until([&] { return recorded().size() > seen.size() || !run.running(); }, "a step");
  run.signal(SIGTERM);
  EXPECT_EQ(run.wait().status, 0);
}

TEST_F(OwnRanks, AKilledOneIsNamed) {
  for (const int rank : {1, 0}) {
    std::filesystem::remove_all(e / "run");
    Ranked run(e, words_of(endless("run")));
    await_checkpoint(run);
    run.signal_rank(rank, SIGKILL);
    const Outcome outcome = run.wait();
    EXPECT_EQ(outcome.status, 1);
    const std::string said = "fathom: Rank " + std::to_string(rank) + " (";
    EXPECT_THAT(outcome.err, ::testing::HasSubstr(said));
    EXPECT_THAT(outcome.err, ::testing::HasSubstr("ended without a word after step"));
    EXPECT_EQ(outcome.err.find("fathom: "), outcome.err.rfind("fathom: ")) << outcome.err;
  }
}

// Nobody is left to tell: the starter does, whether the ranks had met or not.
TEST_F(OwnRanks, OfThoseWhoAreAllKilledTheStarterNamesTheFirst) {
  for (const bool met : {true, false}) {
    for (const int first : {1, 0}) {
      SCOPED_TRACE(first);
      std::filesystem::remove_all(e / "run");
      Ranked run(e, words_of(endless("run")));
      if (met) await_checkpoint(run);
      for (const int rank : {0, 1}) run.signal_rank(rank, SIGSTOP);
      run.signal_rank(first, SIGKILL);
      run.await_end_of(first);
      run.signal_rank(1 - first, SIGKILL);
      const Outcome outcome = run.wait();
      EXPECT_EQ(outcome.status, 1);
      EXPECT_THAT(outcome.err, ::testing::HasSubstr("fathom: Rank " + std::to_string(first) + " (process "));
      EXPECT_THAT(outcome.err, ::testing::HasSubstr("was killed by signal 9"));
    }
  }
}

TEST_F(OwnRanks, RefuseInOneParagraph) {
  const auto train = [](const std::string& more) { return Experiment::train("dense", "run", more); };
  testing::expect_refusal(fathom_command(e, train("--ranks 3")), 2, {"A step has 8 sequences", "3 ranks"});
  testing::expect_refusal(fathom_command(e, train("--ranks 2 --set data.train=nowhere.h5")), 1,
                          {"nowhere.h5"});
  testing::expect_refusal(fathom_command(e, train("--ranks 0")), 2, {"--ranks"});
  testing::expect_refusal(fathom_command(e, train("--ranks 2 --gpus 2")), 2, {"--gpus", "--ranks"});
  testing::expect_refusal(fathom_command(e, train("--gpus 2 --device cpu")), 2, {"--gpus 2", "--device cpu"});
  testing::expect_refusal(fathom_command(e, train("--ranks 2 --device cuda:0")), 2,
                          {"--device cuda:0 names one GPU", "2 ranks of this host"});
  testing::expect_refusal(fathom_command(e, train("--gpus 2")), 1, {"--gpus 2 cannot be had"});
  const std::string in_a_launcher = "RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500";
  testing::expect_refusal(fathom_command(e, train("--ranks 2"), in_a_launcher), 2,
                          {"--ranks", "2 of them already"});
  EXPECT_FALSE(std::filesystem::exists(e / "run/metrics.jsonl"));
}

}  // namespace
}  // namespace fathom
