// A GPU that is asked for and not there: one clear paragraph, whatever this build has; and `auto` goes on
// without.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/system/cli.h"

namespace fathom {
namespace {

using testing::expect_refusal;
using testing::Experiment;
using testing::fathom_command;
using testing::Outcome;

TEST(NoGpu, CudaIsRefusedInOneParagraph) {
  const Experiment e;
  for (const std::string command : {"train dense.yaml --run-dir run", "bench train --preset d2 --steps 1",
                                    "bench copy", "bench gemm", "bench attention", "bench ops"}) {
    for (const std::string device : {"cuda", "cuda:0", "cuda:7"}) {
      SCOPED_TRACE(command + " --device " + device);
      expect_refusal(fathom_command(e, command + " --device " + device), 1, {"GPU", "--device cpu"});
    }
  }
}

TEST(NoGpu, Bf16IsRefusedOnTheCpu) {
  const Experiment e;
  expect_refusal(fathom_command(e, Experiment::train("dense", "run", "--set train.precision=bf16")), 2,
                 {"train.precision", "bf16", "No GPU is used: ", "--set train.precision=fp32"});
  // Nobody wonders why the CPU is used that was asked for.
  const Outcome asked =
      fathom_command(e, Experiment::train("dense", "run", "--set train.precision=bf16 --device cpu"));
  expect_refusal(asked, 2, {"train.precision", "bf16", "fp32"});
  EXPECT_THAT(asked.err, ::testing::Not(::testing::HasSubstr("No GPU is used")));
  expect_refusal(fathom_command(e, "bench train --preset d2 --precision bf16"), 2,
                 {"--precision is bf16", "No GPU is used: ", "--precision fp32"});
  expect_refusal(fathom_command(e, "bench copy --precision bf16"), 2,
                 {"--precision is bf16", "No GPU is used: ", "--precision fp32"});
}

TEST(NoGpu, AutoTrainsOnTheCpuAndSaysSo) {
  const Experiment e;
  const Outcome run =
      fathom_command(e, Experiment::train("dense", "run", "--device auto --set train.steps=3"));
  EXPECT_EQ(run.status, 0) << run.err;
  EXPECT_THAT(e.lines("run").front().at("device"), ::testing::HasSubstr("CPU"));
  EXPECT_THAT(run.err, ::testing::HasSubstr("start at step 0, 0.0 s, on CPU"));
  EXPECT_THAT(run.err, ::testing::Not(::testing::HasSubstr("Warning"))) << "hidden GPUs are no surprise";
}

TEST(NoGpu, DoctorSaysWhyAndSucceeds) {
  const testing::TempFolder folder;
  const Outcome text = fathom_command(folder, "doctor");
  EXPECT_EQ(text.status, 0) << text.err;
  EXPECT_THAT(text.out, ::testing::HasSubstr("\nGPU       "));
  const nlohmann::json json = fathom_command(folder, "doctor --json").json();
  EXPECT_EQ(json.at("gpus").size(), 0U);
  EXPECT_NE(json.at("gpu_why_not"), "");
}

}  // namespace
}  // namespace fathom
