// `mpirun -n N fathom train`: the same run as one process makes, and one that can be gone on with by any
// number.
#include <filesystem>

#include <gtest/gtest.h>

#include "src/model/checkpoint.h"
#include "tests/distributed/mpirun.h"
#include "tests/distributed/same_course.h"
#include "train/comm/wire.h"
#include "train/optimizer.h"

namespace fathom {
namespace {

using testing::Background;
using testing::expect_close;
using testing::Experiment;
using testing::fathom_command;
using testing::fathom_ranks;
using testing::Outcome;
using testing::Ranked;
using testing::read_bytes;
using testing::wait_until;
using testing::words_of;

int times_in(const std::string& text, const std::string& word) {
  int times = 0;
  for (std::size_t at = 0; (at = text.find(word, at)) != std::string::npos; at += word.size()) ++times;
  return times;
}

class Training : public ::testing::Test {
 protected:
  void SetUp() override { SKIP_WITHOUT_MPI(); }

  void trained_by(int ranks, const std::string& kind, const std::string& run, const std::string& more = "") {
    const Outcome outcome = fathom_ranks(e, ranks, Experiment::train(kind, run, more));
    ASSERT_EQ(outcome.status, 0) << outcome.err;
  }
  bool recorded(const std::string& run, const std::string& text) const {
    return read_bytes(e / (run + "/metrics.jsonl")).find(text) != std::string::npos;
  }

  Experiment e;
};

TEST_F(Training, TwoRanksMakeTheRunOfOne) {
  for (const char* kind : {"dense", "mod", "mode", "moe", "stochastic", "documents"}) {
    const std::string run = kind;
    e.trained(kind, run + "-one");
    trained_by(2, kind, run + "-two");
    expect_close(e, run + "-one", run + "-two", 2e-3);
    EXPECT_EQ(testing::computed(e, run + "-one").size(), testing::computed(e, run + "-two").size());
    EXPECT_EQ(e.lines(run + "-two").back().at("status"), "done");
    if (HasFailure()) FAIL() << kind;
  }
}

TEST_F(Training, TheSameRanksMakeTheSameRun) {
  trained_by(2, "mod", "a");
  trained_by(2, "mod", "b");
  testing::expect_same_run(e, "a", "b");
}

TEST_F(Training, ACheckpointKnowsNoNumberOfRanks) {
  const std::string keep = "--set train.keep_checkpoints=9 ";
  for (const char* kind : {"dense", "mode"}) {
    const std::string run = kind;
    e.trained(kind, run + "-one", keep);
    trained_by(2, kind, run + "-two", keep);
    const auto from = [&](const std::string& other) {
      return keep + "--resume " + other + "/checkpoints/step_00000014.h5";
    };
    trained_by(2, kind, run + "-one-two", from(run + "-one"));
    e.trained(kind, run + "-two-one", from(run + "-two"));
    trained_by(4, kind, run + "-two-four", from(run + "-two"));
    EXPECT_EQ(e.metrics(run + "-one-two").steps.front().step, 15);
    expect_close(e, run + "-one", run + "-one-two", 1e-3);
    expect_close(e, run + "-two", run + "-two-one", 1e-3);
    expect_close(e, run + "-two", run + "-two-four", 1e-3);
    // The same number of ranks goes on to the bit.
    trained_by(2, kind, run + "-two-two", from(run + "-two"));
    EXPECT_EQ(testing::content(e.newest_checkpoint(run + "-two")),
              testing::content(e.newest_checkpoint(run + "-two-two")));
  }
}

TEST_F(Training, OneRankAloneSpeaks) {
  const Outcome outcome = fathom_ranks(e, 2, Experiment::train("dense", "run", "--json"));
  EXPECT_EQ(outcome.json().at("status"), "done");
  EXPECT_NE(outcome.err.find("Ranks: 2 ranks by MPI"), std::string::npos) << outcome.err;
  EXPECT_EQ(outcome.err.find("Ranks:"), outcome.err.rfind("Ranks:"));
  const auto again = fathom_ranks(e, 2, Experiment::train("dense", "run", "--json"));
  EXPECT_EQ(again.json().at("already_done"), true);
  const Outcome plan = fathom_ranks(e, 2, Experiment::train("dense", "other", "--json --dry-run"));
  EXPECT_GT(plan.json().at("params_total"), 0);
  EXPECT_FALSE(std::filesystem::exists(e / "other"));
}

TEST_F(Training, ASignalToOneRankStopsAllAtOneStep) {
  const std::string longer =
      "--set train.steps=2000 --set train.checkpoint_every=0 --set train.eval_every=0 ";
  for (const int rank : {1, 0}) {
    Ranked run(e, testing::mpirun(2, words_of(Experiment::train("mod", "run", longer))));
    const std::string reached = "{\"step\":" + std::to_string(rank == 1 ? 20 : 60) + ",";
    wait_until([&] { return recorded("run", reached) || !run.running(); }, "a step");
    run.signal_rank(rank, SIGTERM);
    const Outcome outcome = run.wait();
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    EXPECT_NE(outcome.err.find("Stopped by SIGTERM after step"), std::string::npos) << outcome.err;
    EXPECT_EQ(times_in(outcome.err, "Stopped by"), 3) << outcome.err;  // two events, and the result
    EXPECT_EQ(e.lines("run").back().at("status"), "stopped");
    EXPECT_EQ(e.metrics("run").steps.back().step, e.lines("run").back().at("steps"));
    EXPECT_NE(e.newest_checkpoint("run").find(std::to_string(e.metrics("run").steps.back().step)),
              std::string::npos);
  }
}

TEST_F(Training, SkippedStepsAreTheSameOnAllRanks) {
  trained_by(2, "mod", "run", testing::kSkipsNowAndThen);
  int skipped = 0;
  for (const auto& line : e.lines("run")) skipped += line.value("event", "") == "spike" ? 1 : 0;
  EXPECT_GE(skipped, 1);
  EXPECT_EQ(e.lines("run").back().at("status"), "done");
}

TEST_F(Training, ANumberThatIsNotFiniteIsNamed) {
  e.trained("mod", "half", "--set train.schedule=constant --set train.warmup=1 --set train.steps=20");
  const std::string path = e.newest_checkpoint("half");
  Context c(make_cpu_backend({}, 1), DType::F32);
  const LoadedModel described = load_model(path, c);
  Transformer model(c, described.config.model, described.config.routing, true);
  AdamW optimizer(c, model.parameters(), described.config.train);
  const CheckpointMeta meta = load_checkpoint(path, c, model.parameters(), &optimizer.state());
  // So large that an op overflows.
  const Tensor& weight = model.parameters().get("model.layers.2.self_attn.qkv_proj.weight");
  std::vector<float> values = to_host<float>(c.backend(), weight);
  values.at(5) = 3e38F;
  from_host(c.backend(), weight, values);
  save_checkpoint(path, c, model.parameters(), optimizer.state(), meta);
  const Outcome outcome = fathom_ranks(
      e, 2,
      Experiment::train("mod", "run", "--set train.schedule=constant --set train.warmup=1 --resume half"));
  EXPECT_EQ(outcome.status, 1);
  EXPECT_EQ(times_in(outcome.err, "fathom: "), 1) << outcome.err;
  EXPECT_NE(outcome.err.find("fathom: Training stopped at step 21"), std::string::npos) << outcome.err;
  EXPECT_NE(outcome.err.find("of layer 2"), std::string::npos) << outcome.err;
  EXPECT_NE(outcome.err.find("(rank 0)"), std::string::npos) << outcome.err;
  EXPECT_EQ(e.lines("run").back().at("status"), "failed");
}

TEST_F(Training, StepsThatRanksCannotShareAreRefused) {
  const Outcome three = fathom_ranks(e, 3, Experiment::train("dense", "run"));
  EXPECT_EQ(three.status, 2);
  EXPECT_NE(three.err.find("A step has 8 sequences"), std::string::npos) << three.err;
  EXPECT_EQ(three.err.find("fathom: "), three.err.rfind("fathom: ")) << three.err;
  EXPECT_FALSE(std::filesystem::exists(e / "run/metrics.jsonl"));
}

// Two ranks that no launcher of MPI started.
class WithoutMpi : public ::testing::Test {
 protected:
  static std::vector<std::string> as_rank(int rank, const std::string& arguments) {
    std::vector<std::string> words{"env", "RANK=" + std::to_string(rank), "WORLD_SIZE=2",
                                   "MASTER_ADDR=127.0.0.1", "MASTER_PORT=" + std::to_string(port())};
    for (const std::string& word : words_of(arguments)) words.push_back(word);
    return words;
  }
  static int port() {
    static const int free = listen_anywhere(true).port;
    return free;
  }
  Experiment e;
};

TEST_F(WithoutMpi, TwoRanksMakeTheRunOfOne) {
  e.trained("mod", "one");
  const std::string command = Experiment::train("mod", "two");
  Background second(e, as_rank(1, command), Background::Gpus::None, "second");
  Background first(e, as_rank(0, command));
  const Outcome outcome = first.wait();
  EXPECT_EQ(outcome.status, 0) << outcome.err;
  EXPECT_NE(outcome.err.find("Ranks: 2 ranks by TCP"), std::string::npos) << outcome.err;
  const Outcome silent = second.wait();
  EXPECT_EQ(silent.status, 0) << silent.err;
  EXPECT_EQ(silent.err + silent.out, "");
  expect_close(e, "one", "two", 2e-3);
}

TEST_F(WithoutMpi, AKilledRankIsNamed) {
  const std::string command = Experiment::train("mod", "run", "--set train.steps=100000");
  Background second(e, as_rank(1, command), Background::Gpus::None, "second");
  Background first(e, as_rank(0, command));
  wait_until([&] { return !e.newest_checkpoint("run").empty() || !first.running(); }, "a checkpoint");
  second.signal(SIGKILL);
  second.wait();
  const Outcome outcome = first.wait();
  EXPECT_EQ(outcome.status, 1);
  EXPECT_NE(outcome.err.find("fathom: Rank 1 ("), std::string::npos) << outcome.err;
  EXPECT_NE(outcome.err.find("ended without a word after step"), std::string::npos) << outcome.err;
  EXPECT_EQ(e.lines("run").back().at("status"), "failed");
}

TEST_F(WithoutMpi, WhatIsNotSaidIsRefused) {
  testing::expect_refusal(fathom_command(e, Experiment::train("dense", "run"), "RANK=0 WORLD_SIZE=2"), 1,
                          {"RANK=0 and WORLD_SIZE=2", "MASTER_ADDR"});
  testing::expect_refusal(fathom_command(e, Experiment::train("dense", "run"), "RANK=2 WORLD_SIZE=2"), 1,
                          {"RANK=2", "count from 0"});
  e.trained("dense", "run", "", "RANK=0 WORLD_SIZE=1");
}

}  // namespace
}  // namespace fathom
