// Trainings through the binary on a GPU: they learn what the CPU learns, and go on to the bit.
#include <cmath>
#include <csignal>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/devices.h"
#include "tests/system/cli.h"
#include "train/run_folder.h"

namespace fathom {
namespace {

using testing::Background;
using testing::content;
using testing::expect_same_run;
using testing::Experiment;
using testing::fathom_command;
using testing::kWithGpu;
using testing::Outcome;
using testing::read_bytes;
using testing::wait_until;

const std::string kOpByOp = std::string(kWithGpu) + " export CUDA_LAUNCH_BLOCKING=1;";

struct Case {
  std::string kind;
  std::string precision;
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.kind << ", " << c.precision; }
};

class CudaTraining : public testing_support::OnCuda<::testing::TestWithParam<Case>> {
 protected:
  /// Trains on the GPU, deterministically.
  void trained(const std::string& run, const std::string& more = "") const {
    e.trained(GetParam().kind, run, on_gpu() + more, kWithGpu);
  }
  void op_by_op(const std::string& run, const std::string& more = "") const {
    e.trained(GetParam().kind, run, on_gpu() + more, kOpByOp);
  }
  static std::string on_gpu() {
    return "--device cuda --set deterministic=true --set train.precision=" + GetParam().precision + " ";
  }
  // Of what is said of steps that are spikes or not finite.
  std::vector<std::string> oddities(const std::string& run) const {
    std::vector<std::string> messages;
    for (const auto& line : e.lines(run)) {
      const std::string event = line.value("event", "");
      if (event == "spike" || event == "nan") messages.push_back(line.at("message"));
    }
    return messages;
  }
  bool in_bf16() const { return GetParam().precision == "bf16"; }

  Experiment e;
};

TEST_P(CudaTraining, LearnsWhatTheCpuLearns) {
  trained("gpu");
  e.trained(GetParam().kind, "cpu", "--device cpu");
  EXPECT_THAT(e.lines("gpu").front().at("device"), ::testing::Not(::testing::HasSubstr("CPU")));
  const auto gpu = e.metrics("gpu").steps;
  const auto cpu = e.metrics("cpu").steps;
  ASSERT_EQ(gpu.size(), cpu.size());
  for (std::size_t i = 0; i < gpu.size(); ++i) {
    // Routers choose from scores that differ by rounding, so trainings part slowly.
    const double tolerance = in_bf16() ? 3e-2 : i < 10 ? 1e-4 : 5e-3;
    EXPECT_NEAR(gpu[i].loss, cpu[i].loss, tolerance * cpu[i].loss) << i;
  }
}

TEST_P(CudaTraining, TheSameSeedGivesTheSameBits) {
  trained("a");
  trained("b");
  expect_same_run(e, "a", "b");
}

// A run whose steps are not captured waits for each of them, so nothing is launched ahead there.
TEST_P(CudaTraining, CapturedStepsLaunchedAheadAreStepsOpByOp) {
  trained("captured");
  op_by_op("single");
  expect_same_run(e, "captured", "single");
}

// Steps that do not count, and what was launched behind them: the rate throws the loss up.
TEST_P(CudaTraining, CapturedStepsThatAreSkippedAreThoseOpByOp) {
  trained("half", "--set train.schedule=constant --set train.warmup=1 --set train.steps=25");
  for (const std::string rate : {"0.05", "1"}) {
    const std::string wild =
        on_gpu() + "--resume half --set train.schedule=constant --set train.warmup=1 --set train.lr=" + rate +
        " --set train.grad_clip=0 --set train.spike_factor=1.02 --set train.on_spike=skip";
    const std::string captured = "captured" + rate, single = "single" + rate;
    fathom_command(e, Experiment::train(GetParam().kind, captured, wild), kWithGpu);
    fathom_command(e, Experiment::train(GetParam().kind, single, wild), kOpByOp);
    EXPECT_EQ(oddities(captured), oddities(single));
    expect_same_run(e, captured, single);
  }
  EXPECT_EQ(oddities("captured1").size(), 11U) << "ten are skipped in a row";
}

// Some are skipped and those behind them are made: launched ahead, these begin before it is known.
TEST_P(CudaTraining, CapturedStepsBehindSkippedOnesAreThoseOpByOp) {
  trained("captured", testing::kSkipsNowAndThen);
  op_by_op("single", testing::kSkipsNowAndThen);
  EXPECT_EQ(oddities("captured"), oddities("single"));
  EXPECT_GE(oddities("captured").size(), 1U);
  EXPECT_LE(oddities("captured").size(), 50U);
  expect_same_run(e, "captured", "single");
}

// Steps follow each other without a pause, so one is always under way when the signal comes.
TEST_P(CudaTraining, AfterSigtermGoesOnToTheBit) {
  const std::string longer = "--set train.steps=1500";
  trained("whole", longer);
  for (const char* step : {"100", "700"}) {
    Background run(e, Experiment::train(GetParam().kind, "parts", on_gpu() + longer), Background::Gpus::Ours);
    const std::string line = std::string("{\"step\":") + step + ",";
    wait_until(
        [&] {
          return read_bytes(e / "parts/metrics.jsonl").find(line) != std::string::npos || !run.running();
        },
        "a step");
    run.signal(SIGTERM);
    const Outcome outcome = run.wait();
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    const auto end = e.lines("parts").back();
    EXPECT_EQ(end.at("status"), "stopped");
    EXPECT_LT(end.at("steps"), 1500);
    EXPECT_EQ(e.metrics("parts").steps.back().step, end.at("steps"));
  }
  trained("parts", longer);
  expect_same_run(e, "whole", "parts");
}

TEST_P(CudaTraining, RecomputationChangesNoBit) {
  trained("kept");
  trained("recomputed", "--set train.recompute=block");
  expect_same_run(e, "kept", "recomputed");
}

TEST_P(CudaTraining, GoesOnFromACheckpointToTheBit) {
  trained("whole", "--set train.keep_checkpoints=100");
  const auto checkpoints = list_checkpoints(e / "whole");
  ASSERT_GE(checkpoints.size(), 3U);
  trained("part", "--resume " + checkpoints[1].path.string());
  EXPECT_GT(e.metrics("part").steps.front().step, 1);
  EXPECT_EQ(content(e.newest_checkpoint("whole")), content(e.newest_checkpoint("part")));
}

TEST_P(CudaTraining, IsEvaluatedAndGeneratesOnBothDevices) {
  trained("run");
  double losses[2] = {};
  for (const bool gpu : {false, true}) {
    const std::string device = gpu ? " --device cuda" : " --device cpu";
    const Outcome eval =
        fathom_command(e, "eval run --data train.valid.h5 --tokens 2048 --json" + device, kWithGpu);
    losses[gpu ? 1 : 0] = eval.json().at("loss");
    const Outcome text =
        fathom_command(e, "generate run -p Mara -n 8 --temperature 0 --json" + device, kWithGpu);
    EXPECT_GE(text.json().at("tokens").size(), 1U);
  }
  EXPECT_NEAR(losses[1], losses[0], (in_bf16() ? 2e-2 : 2e-3) * losses[0]);
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const char* kind : {"dense", "mod", "moe", "documents", "stochastic"}) {
    for (const char* precision : {"fp32", "bf16"}) all.push_back({kind, precision});
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Models, CudaTraining, ::testing::ValuesIn(cases()),
                         [](const auto& p) { return p.param.kind + "_" + p.param.precision; });

class CudaCommands : public testing_support::OnCuda<::testing::Test> {
 protected:
  Experiment e;
};

TEST_F(CudaCommands, DoctorListsTheGpuAndItsLibraries) {
  const auto json = fathom_command(e, "doctor --json", kWithGpu).json();
  ASSERT_GE(json.at("gpus").size(), 1U);
  EXPECT_GT(json["gpus"][0].at("memory_bytes"), 0);
  EXPECT_GT(json["gpus"][0].at("memory_free_bytes"), 0);
  ASSERT_EQ(json.at("cuda_libraries").size(), 3U);
  for (const auto& library : json["cuda_libraries"]) {
    // One of the two: a version, or why there is none.
    EXPECT_NE(library.at("version").is_null(), library.at("why_not").get<std::string>().empty()) << library;
  }
  EXPECT_FALSE(json["cuda_libraries"][0]["version"].is_null()) << "training needs cuBLASLt";
  EXPECT_EQ(json.at("gpu_why_not"), "");
}

TEST_F(CudaCommands, BenchesPrintLinesOfJsonWithTheirCeilings) {
  for (const std::string bench : {"copy", "gemm --shape 512x256x384",
                                  "attention --seq 256 --batch 1 --heads 2", "ops --rows 1024 --width 256"}) {
    const Outcome outcome = fathom_command(e, "bench " + bench + " --device cuda --json", kWithGpu);
    ASSERT_EQ(outcome.status, 0) << outcome.err;
    const nlohmann::json line = nlohmann::json::parse(outcome.out.substr(0, outcome.out.find('\n')));
    EXPECT_GT(line.at("share_of_ceiling"), 0) << bench;
    EXPECT_LT(line.at("share_of_ceiling"), 1.3) << bench;
  }
}

}  // namespace
}  // namespace fathom
