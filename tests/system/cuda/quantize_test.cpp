// fathom quantize on a GPU: the same bytes each time, and a model as good as the one that a CPU makes.
#include <cmath>
#include <string>

#include <gtest/gtest.h>

#include "tests/devices.h"
#include "tests/system/cli.h"

namespace fathom {
namespace {

using testing::Experiment;
using testing::fathom_command;
using testing::kWithGpu;
using testing::Outcome;
using testing::read_bytes;

class CudaQuantize : public testing_support::OnCuda<::testing::TestWithParam<std::string>> {
 protected:
  nlohmann::json succeeds(const std::string& arguments, const char* environment = "") {
    const Outcome outcome = fathom_command(e, arguments + " --json", environment);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    return outcome.status == 0 ? nlohmann::json::parse(outcome.out) : nlohmann::json();
  }
  Experiment e;
};

// The Hessians are summed by the GPU and factored by the host's threads.
TEST_P(CudaQuantize, TheSameSeedGivesTheSameBytesWhateverTheThreads) {
  const std::string run = GetParam();
  e.trained(run, run, run == "dense" ? "" : "--set routing.capacity=0.5 --set train.steps=120");
  const std::string command =
      "quantize " + run + " --method quarot --weights 4 --activations 8 --kv 4 --calibration train.h5 ";
  succeeds(command + "-o gpu --device cuda --threads 1", kWithGpu);
  const std::string weights = read_bytes(e / "gpu/model.safetensors"),
                    report = read_bytes(e / "gpu/quantization_report.json");
  succeeds(command + "-o gpu --device cuda --threads 3", kWithGpu);
  EXPECT_EQ(read_bytes(e / "gpu/model.safetensors"), weights);
  EXPECT_EQ(read_bytes(e / "gpu/quantization_report.json"), report);

  const nlohmann::json by_cpu = succeeds(command + "-o cpu --device cpu").at("report").at("matrices"),
                       by_gpu = nlohmann::json::parse(report).at("matrices");
  ASSERT_EQ(by_gpu.size(), by_cpu.size());
  for (std::size_t i = 0; i < by_gpu.size(); ++i) {
    const double error = by_cpu[i].at("output_error");
    EXPECT_NEAR(by_gpu[i].at("output_error").get<double>(), error, 0.2 * error + 0.002) << by_gpu[i].dump();
  }
  const auto loss = [&](const std::string& model) {
    return succeeds("eval " + model + " --seq-len 32 --data train.valid.h5 --device cpu")
        .at("loss")
        .get<double>();
  };
  EXPECT_NEAR(loss("gpu"), loss("cpu"), 0.02);
  EXPECT_NE(loss("gpu"), loss(run));
}

INSTANTIATE_TEST_SUITE_P(Models, CudaQuantize, ::testing::Values("dense", "mod", "mode"),
                         [](const auto& i) { return i.param; });

}  // namespace
}  // namespace fathom
