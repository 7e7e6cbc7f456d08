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
    // It is another model: other weights, and untied. Another seed gives one more.
    EXPECT_NE(said.at("outlier_before"), said.at("outlier_after"));
    const auto config = nlohmann::json::parse(testing::read_bytes(e / (run + "-rotated/config.json")));
    EXPECT_EQ(config.at("tie_word_embeddings"), false);
    succeeds("quantize " + run + " -o " + run + "-other --method rotate-only --seed 4");
    EXPECT_NE(testing::read_bytes(e / (run + "-rotated/model.safetensors")),
              testing::read_bytes(e / (run + "-other/model.safetensors")));
    EXPECT_GE(said.at("calibration_tokens").get<int>(), 512);
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
  EXPECT_EQ(fathom_command(e, "tokenizer train text.jsonl --vocab 400 -o bpe.model").status, 0);
  EXPECT_EQ(fathom_command(e, "data prepare text.jsonl --tokenizer bpe.model -o bpe.h5").status, 0);
  expect_refusal(fathom_command(e, "quantize run -o out --method rotate-only --calibration bpe.h5"), 1,
                 {"bpe.h5", "tokenizer"});
  EXPECT_FALSE(std::filesystem::exists(e / "out"));
  expect_refusal(fathom_command(e, "quantize nowhere -o out --method gptq"), 2, {"--method", "rotate-only"});
  expect_refusal(fathom_command(e, "quantize nowhere -o out"), 2, {"--method"});
}

}  // namespace
}  // namespace fathom
