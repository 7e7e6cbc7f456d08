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

TEST_F(Quantize, AModelOfFewBitsIsEvaluatedAndGenerates) {
  for (const std::string run : {"dense", "mod"}) {
    e.trained(run, run);
    const nlohmann::json before = succeeds("eval " + run + " --data train.valid.h5");
    double last = 1;
    for (const auto& [flags, most_loss] : {std::pair{"--method rtn --group 8", 0.1},
                                           {"--method quarot --weights 4 --seed 3", 0.2},
                                           {"--method rtn --weights 8 --precision bf16", 0.02}}) {
      SCOPED_TRACE(run + " " + flags);
      const nlohmann::json said = succeeds("quantize " + run + " -o few " + flags);
      const bool is_rotated = std::string(flags).find("quarot") != std::string::npos;
      EXPECT_EQ(said.at("method"), is_rotated ? "quarot" : "rtn");
      EXPECT_EQ(said.contains("outlier_after"), is_rotated);
      EXPECT_LT(said.at("bytes").get<double>(), 0.8 * said.at("bytes_before").get<double>());
      for (const char* kind : {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}) {
        const double error = said.at("relative_error").at(kind);
        EXPECT_GT(error, 0.001) << kind;
        EXPECT_LT(error, said.at("weights") == 4 ? 0.2 : 0.01) << kind;
        last = error;
      }
      const auto config =
          nlohmann::json::parse(testing::read_bytes(e / "few/config.json")).at("quantization_config");
      EXPECT_EQ(config.at("bits"), said.at("weights"));
      EXPECT_EQ(config.at("group_size"), said.at("group"));
      EXPECT_EQ(config.at("rotation_seed"), is_rotated ? nlohmann::json(3) : nlohmann::json());
      const nlohmann::json after = succeeds("eval few --data train.valid.h5");
      EXPECT_NEAR(after.at("loss").get<double>(), before.at("loss").get<double>(), most_loss);
      EXPECT_NE(after.at("loss"), before.at("loss"));
      EXPECT_NEAR(succeeds("eval few --engine --data train.valid.h5").at("loss").get<double>(),
                  after.at("loss").get<double>(), 1e-3);
      const std::string text = "generate few -p 'Mara lives' -n 20 --temperature 0";
      EXPECT_EQ(succeeds(text).at("tokens").size(), 20U);
      EXPECT_EQ(succeeds(text + " --invariant").at("tokens").size(), 20U);
      const std::string weights = testing::read_bytes(e / "few/model.safetensors");
      succeeds("quantize " + run + " -o few " + flags);
      EXPECT_EQ(testing::read_bytes(e / "few/model.safetensors"), weights);
    }
    EXPECT_LT(last, 0.01);
  }
  // Weights of few bits are the end of the way.
  for (const std::string command :
       {"quantize few -o out --method rtn", "export few -o out", "import few -o out"}) {
    expect_refusal(fathom_command(e, command), 1, {"few", "8 bits", "before it was quantized"});
  }
  EXPECT_FALSE(std::filesystem::exists(e / "out"));
  const nlohmann::json bench = succeeds(
      "bench decode --preset d2 --vocab 512 --context 8 --steps 2 --variant mod --weights 4 --group 64");
  EXPECT_EQ(bench.at("weights"), 4);
  EXPECT_GT(bench.at("share_of_ceiling").get<double>(), 0);
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
  expect_refusal(fathom_command(e, "quantize run -o out --method rtn --group 7"), 1,
                 {"groups of 7", "do not divide"});
  EXPECT_FALSE(std::filesystem::exists(e / "out"));
  expect_refusal(fathom_command(e, "quantize run -o out --method rtn --weights 16"), 2,
                 {"rtn", "--weights 16"});
  expect_refusal(fathom_command(e, "quantize run -o out --method rotate-only --weights 4"), 2,
                 {"rotate-only", "--weights 4"});
  expect_refusal(fathom_command(e, "quantize run -o out --method rotate-only --group 8"), 2, {"--group"});
  expect_refusal(fathom_command(e, "quantize run -o out --method rtn --calibration train.h5"), 2,
                 {"--calibration"});
  expect_refusal(fathom_command(e, "quantize run -o out --method rtn --weights 5"), 2, {"--weights"});
  expect_refusal(fathom_command(e, "quantize nowhere -o out --method gptq"), 2, {"--method", "rotate-only"});
  expect_refusal(fathom_command(e, "quantize nowhere -o out"), 2, {"--method"});
}

}  // namespace
}  // namespace fathom
