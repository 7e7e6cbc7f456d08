// Stopping and going on, through the binary: a run that was stopped, killed or interrupted anywhere computes,
// to the bit, what an uninterrupted one does.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <thread>

#include <gtest/gtest.h>

#include "tests/system/cli.h"

namespace fathom {
namespace {

using testing::Background;
using testing::computed;
using testing::expect_refusal;
using testing::expect_same_run;
using testing::Experiment;
using testing::fathom_command;
using testing::Outcome;
using testing::read_bytes;
using testing::wait_until;

class Resume : public ::testing::TestWithParam<const char*> {
 protected:
  // Whether `text` stands in the run's metrics yet.
  bool recorded(const std::string& run, const std::string& text) const {
    return read_bytes(e / (run + "/metrics.jsonl")).find(text) != std::string::npos;
  }

  Experiment e;
  const std::string kind = GetParam();
};
INSTANTIATE_TEST_SUITE_P(Models, Resume, ::testing::Values("dense", "mod", "mode"),
                         [](const auto& model) { return std::string(model.param); });

TEST_P(Resume, AfterSigtermGoesOnToTheBit) {
  const std::string longer = "--set train.steps=300";
  e.trained(kind, "whole", longer);
  int stops = 0;
  for (const int after : {20, 100, 200}) {
    Background run(e, Experiment::train(kind, "parts", longer));
    wait_until(
        [&] { return recorded("parts", "{\"step\":" + std::to_string(after) + ",") || !run.running(); },
        "a step");
    run.signal(SIGTERM);
    const Outcome outcome = run.wait();
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    EXPECT_NE(outcome.err.find("Stopped by SIGTERM after step"), std::string::npos) << outcome.err;
    EXPECT_NE(outcome.err.find("--resume auto"), std::string::npos) << outcome.err;
    const auto end = e.lines("parts").back();
    EXPECT_EQ(end.at("event"), "end");
    EXPECT_EQ(end.at("status"), "stopped");
    // Nothing is lost: the newest checkpoint is of the very step that it stopped after.
    EXPECT_EQ(e.metrics("parts").steps.back().step, end.at("steps"));
    stops += end.at("steps") < 300 ? 1 : 0;
  }
  EXPECT_EQ(stops, 3);
  e.trained(kind, "parts", longer);
  expect_same_run(e, "whole", "parts");
}

TEST_P(Resume, AfterKillGoesOnToTheBit) {
  const std::string longer = "--set train.steps=300";
  e.trained(kind, "whole", longer);
  for (const int after : {3, 60, 150, 151}) {
    Background run(e, Experiment::train(kind, "parts", longer));
    wait_until(
        [&] { return recorded("parts", "{\"step\":" + std::to_string(after) + ",") || !run.running(); },
        "a step");
    run.signal(SIGKILL);
    EXPECT_EQ(run.wait().status, -SIGKILL);
  }
  e.trained(kind, "parts", longer);
  expect_same_run(e, "whole", "parts");
}

TEST_P(Resume, ASignalDuringAnEvaluationLosesNothing) {
  // An evaluation far longer than its steps: the signal comes within one.
  const std::string slow =
      "--set train.eval_every=10 --set train.eval_tokens=5000 --set train.steps=30 "
      "--set train.checkpoint_every=0";
  e.trained(kind, "whole", slow);
  Background run(e, Experiment::train(kind, "parts", slow));
  wait_until([&] { return recorded("parts", "{\"step\":10,") || !run.running(); }, "step 10");
  run.signal(SIGTERM);
  EXPECT_EQ(run.wait().status, 0);
  e.trained(kind, "parts", slow);
  expect_same_run(e, "whole", "parts");
}

TEST_P(Resume, ARunThatIsDoneSaysSoAndIsLeftAlone) {
  e.trained(kind, "run");
  const std::string before = read_bytes(e / "run/metrics.jsonl");
  const Outcome again = fathom_command(e, Experiment::train(kind, "run"));
  EXPECT_EQ(again.status, 0);
  EXPECT_NE(again.err.find("run is done: 40 steps"), std::string::npos) << again.err;
  EXPECT_EQ(read_bytes(e / "run/metrics.jsonl"), before);
  const auto json = fathom_command(e, Experiment::train(kind, "run", "--json")).json();
  EXPECT_EQ(json.at("already_done"), true);
  EXPECT_EQ(json.at("status"), "done");
}

TEST_P(Resume, KilledAfterTheLastCheckpointTheEndIsOnlyRecorded) {
  e.trained(kind, "whole");
  e.trained(kind, "run");
  // As if killed before its end was recorded.
  std::string metrics = read_bytes(e / "run/metrics.jsonl");
  metrics.resize(metrics.rfind("{\"event\":\"end\""));
  testing::write_bytes(e / "run/metrics.jsonl", metrics);
  e.trained(kind, "run");
  expect_same_run(e, "whole", "run");
  EXPECT_EQ(e.lines("run").back().at("status"), "done");
  EXPECT_EQ(e.lines("run").back().at("best_val_loss"), e.lines("whole").back().at("best_val_loss"));
}

TEST_P(Resume, TheBestEvaluationSurvivesAKill) {
  // The loss rises after the first evaluation, which SIGTERM interrupts: it is made again at the resume,
  // after its step's checkpoint was written, and the kill comes before the next one.
  const std::string flags =
      "--set train.lr=3 --set train.grad_clip=0 --set train.warmup=10 --set train.schedule=constant --set "
      "train.eval_every=2 --set train.eval_tokens=5000 --set train.steps=30 --set train.checkpoint_every=0 "
      "--set "
      "train.on_spike=warn";
  Background run(e, Experiment::train(kind, "parts", flags));
  wait_until([&] { return recorded("parts", "{\"step\":2,") || !run.running(); }, "step 2");
  run.signal(SIGTERM);
  EXPECT_EQ(run.wait().status, 0);
  Background second(e, Experiment::train(kind, "parts", flags));
  wait_until([&] { return !e.metrics("parts").evals.empty() || !second.running(); }, "an evaluation");
  second.signal(SIGKILL);
  second.wait();
  e.trained(kind, "parts", flags);
  double best = INFINITY;
  for (const EvalRecord& r : e.metrics("parts").evals) best = std::min(best, r.judged_loss());
  EXPECT_EQ(e.lines("parts").back().at("best_val_loss"), best);
}

TEST_P(Resume, FromAnotherRunsCheckpointInANewFolder) {
  const std::string longer = "--set train.steps=300";
  e.trained(kind, "whole", longer);
  Background run(e, Experiment::train(kind, "first", longer));
  wait_until([&] { return recorded("first", "{\"step\":50,") || !run.running(); }, "step 50");
  run.signal(SIGTERM);
  ASSERT_EQ(run.wait().status, 0);
  // Killed at once, it must not begin from nothing.
  {
    Background second(e, Experiment::train(kind, "second", longer + " --resume first"));
    wait_until([&] { return recorded("second", "\"event\":\"resume\"") || !second.running(); }, "its resume");
    second.signal(SIGKILL);
    second.wait();
  }
  e.trained(kind, "second", longer + " --resume first");
  EXPECT_GT(e.metrics("second").steps.front().step, 50);
  EXPECT_EQ(testing::content(e.newest_checkpoint("whole")), testing::content(e.newest_checkpoint("second")));
  // What `auto` finds afterwards is the new folder's own.
  const Outcome again = fathom_command(e, Experiment::train(kind, "second", longer));
  EXPECT_NE(again.err.find("second is done"), std::string::npos) << again.err;
}

TEST(Signals, TheSecondOneStopsAtOnce) {
  const Experiment e;
  const std::string flags =
      "--set train.steps=100000 --set train.batch_tokens=65536 --set train.micro_batch=2048";
  Background run(e, Experiment::train("dense", "run", flags));
  wait_until([&] { return std::filesystem::exists(e / "run/metrics.jsonl"); }, "the start");
  run.signal(SIGINT);
  std::this_thread::sleep_for(std::chrono::milliseconds(150));
  if (run.running()) {
    run.signal(SIGINT);
    const int status = run.wait().status;
    EXPECT_TRUE(status == 130 || status == 0) << status;
  }
  // And the folder can be used.
  const Outcome next = fathom_command(e, Experiment::train("dense", "run", flags + " --dry-run"));
  EXPECT_EQ(next.status, 0) << next.err;
}

TEST(Signals, BeforeTheFirstStepNothingIsLeftToSave) {
  const Experiment e;
  Background run(e, Experiment::train("dense", "run", "--set train.steps=1000"));
  wait_until([&] { return std::filesystem::exists(e / "run/.lock"); }, "the lock");
  run.signal(SIGTERM);
  EXPECT_EQ(run.wait().status, 0);
  e.trained("dense", "run", "--set train.steps=1000 --set train.eval_every=0");
  EXPECT_EQ(e.metrics("run").steps.size(), 1000u);
}

TEST(Signals, AClosedTerminalIsARequestToStop) {
  const Experiment e;
  Background run(e, Experiment::train("dense", "run", "--set train.steps=100000"));
  wait_until([&] { return !e.newest_checkpoint("run").empty(); }, "a checkpoint");
  run.signal(SIGHUP);
  const Outcome outcome = run.wait();
  EXPECT_EQ(outcome.status, 0);
  EXPECT_NE(outcome.err.find("Stopped by SIGHUP"), std::string::npos) << outcome.err;
}

TEST(Signals, AClosedPipeDoesNotEndATraining) {
  const Experiment e;
  const Outcome outcome =
      fathom_command(e, Experiment::train("dense", "run", "2>&1 | head -n 1 ; true") + " #");
  EXPECT_EQ(outcome.status, 0);
  wait_until(
      [&] { return read_bytes(e / "run/metrics.jsonl").find("\"status\":\"done\"") != std::string::npos; },
      "the end");
}

TEST(Signals, TheLockNamesTheOtherTraining) {
  const Experiment e;
  Background run(e, Experiment::train("dense", "run", "--set train.steps=100000"));
  wait_until([&] { return !e.newest_checkpoint("run").empty(); }, "a checkpoint");
  expect_refusal(fathom_command(e, Experiment::train("dense", "run", "--set train.steps=100000")), 1,
                 {"run", "in use", std::to_string(run.pid()), "--run-dir"});
  run.signal(SIGKILL);
  run.wait();
  EXPECT_EQ(fathom_command(e, Experiment::train("dense", "run", "--set train.steps=100000 --dry-run")).status,
            0);
}

class Twins : public Resume {};
INSTANTIATE_TEST_SUITE_P(Models, Twins, ::testing::Values("dense", "mod"),
                         [](const auto& model) { return std::string(model.param); });

TEST_P(Twins, TheSameSeedGivesTheSameBits) {
  e.trained(kind, "a");
  e.trained(kind, "b");
  expect_same_run(e, "a", "b");
  e.trained(kind, "c", "--set seed=2");
  EXPECT_NE(computed(e, "a"), computed(e, "c"));
}

TEST_P(Twins, RecomputationChangesNoBit) {
  e.trained(kind, "kept");
  e.trained(kind, "recomputed", "--set train.recompute=block");
  expect_same_run(e, "kept", "recomputed");
}

TEST_P(Twins, MicroBatchesChangeTheLossOnlyByRounding) {
  e.trained(kind, "four");
  e.trained(kind, "eight", "--set train.micro_batch=8");
  const auto a = e.metrics("four").steps;
  const auto b = e.metrics("eight").steps;
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < 10; ++i) EXPECT_NEAR(a[i].loss, b[i].loss, 1e-4 * a[i].loss) << i;
}

TEST(Predictors, NeverChangeWhatTheModelLearns) {
  const Experiment e;
  e.trained("mod", "aux", "--set routing.causal.method=aux");
  e.trained("mod", "both");
  e.trained("mod", "none", "--set routing.causal.method=none");
  e.trained("mod", "predictor", "--set routing.causal.method=predictor");
  const auto losses = [&](const char* run) {
    std::vector<double> all;
    for (const StepRecord& r : e.metrics(run).steps) all.push_back(r.loss);
    for (const EvalRecord& r : e.metrics(run).evals) all.push_back(*r.val_topk);
    return all;
  };
  EXPECT_EQ(losses("aux"), losses("both"));
  EXPECT_EQ(losses("none"), losses("predictor"));
  EXPECT_NE(losses("aux"), losses("none"));
}

TEST_P(Twins, TensorMemoryStaysFlat) {
  e.trained(kind, "run", "--set train.steps=300");
  std::vector<double> memory, held;
  for (const StepRecord& r : e.metrics("run").steps) {
    if (r.step <= 6) continue;  // after the first evaluation
    memory.push_back(r.memory_bytes.value());
    held.push_back(r.memory_held_bytes.value());
  }
  ASSERT_EQ(memory.size(), 294u);
  for (const double bytes : memory) ASSERT_EQ(bytes, memory.front());
  EXPECT_GE(held.front(), memory.front());
  // Causal evaluations of a routed model ask for a size now and then that was not seen before.
  EXPECT_LE(held.back(), (kind == "mod" ? 1.05 : 1.0) * held.front());
}

}  // namespace
}  // namespace fathom
