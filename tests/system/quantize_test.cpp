// fathom quantize from the command line: what comes out computes what went in.
#include <cmath>
#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/system/cli.h"

namespace fathom {
namespace {

using testing::expect_refusal;
using testing::Experiment;
using testing::fathom_command;
using testing::Outcome;

class Quantize : public ::testing::Test {
 protected:
  nlohmann::json succeeds(const std::string& arguments) {
    const Outcome outcome = fathom_command(e, arguments + " --json");
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    return nlohmann::json::parse(outcome.out);
  }
  Experiment e;
};

TEST_F(Quantize, ARotatedModelHasTheLossAndTheTextsOfItsOwn) {
  for (const char* variant : {"dense", "mod"}) {
    SCOPED_TRACE(variant);
    const std::string run = variant;
    e.trained(variant, run, "--set model.tie_embeddings=true");
    const nlohmann::json said =
        succeeds("quantize " + run + " -o " + run +
                 "-rotated --method rotate-only --seed 3 --calibration train.valid.h5");
    EXPECT_EQ(said.at("method"), "rotate-only");
    EXPECT_EQ(said.at("model_type"), run == "dense" ? "llama" : "fathom");
    EXPECT_GT(said.at("stream_block").get<int>(), 1);
    EXPECT_GT(said.at("outlier_before").get<double>(), said.at("outlier_after").get<double>() * 0.5);
    EXPECT_GT(said.at("calibration_tokens").get<int>(), 0);
    const auto stream = said.at("stream_outliers_after").get<std::vector<double>>();
    EXPECT_EQ(stream.size(), said.at("stream_outliers_before").size());
    for (const double x : stream) EXPECT_GT(x, 1);
    const nlohmann::json before = succeeds("eval " + run + " --data train.valid.h5"),
                         after = succeeds("eval " + run + "-rotated --data train.valid.h5");
    EXPECT_NEAR(after.at("loss").get<double>(), before.at("loss").get<double>(), 2e-6);
    if (run == "mod") {
      EXPECT_EQ(after.at("realised_capacity"), before.at("realised_capacity"));
    }
    const std::string text = " -p 'Mara lives' -n 20 --temperature 0";
    EXPECT_EQ(succeeds("generate " + run + "-rotated" + text).at("tokens"),
              succeeds("generate " + run + text).at("tokens"));
  }
}

TEST_F(Quantize, RefusesWhatItCannot) {
  expect_refusal(fathom_command(e, "quantize nowhere -o out --method rotate-only"), 1, {"nowhere"});
  e.trained("dense", "run");
  expect_refusal(fathom_command(e, "quantize run -o out --method rotate-only --calibration nothing.h5"), 1,
                 {"nothing.h5"});
  EXPECT_FALSE(std::filesystem::exists(e / "out"));
  expect_refusal(fathom_command(e, "quantize nowhere -o out --method gptq"), 2, {"--method", "rotate-only"});
  expect_refusal(fathom_command(e, "quantize nowhere -o out"), 2, {"--method"});
}

}  // namespace
}  // namespace fathom
