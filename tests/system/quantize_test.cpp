// fathom quantize from the command line: what comes out computes what went in.
#include <chrono>
#include <cmath>
#include <filesystem>
#include <thread>

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
    EXPECT_EQ(config.at("quantization_config").at("online_hadamards").size(), 3U);
    expect_refusal(fathom_command(e, "export " + run + "-rotated -o out"), 1,
                   {"rotated", "before it was rotated"});
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

TEST_F(Quantize, RowsOfFewBitsAreEvaluatedAndGenerate) {
  for (const std::string run : {"dense", "mod"}) {
    e.trained(run, run);
    const double before = succeeds("eval " + run + " --data train.valid.h5").at("loss");
    for (const auto& [flags, most_loss] :
         {std::pair{"--method quarot --weights 8 --activations 8", 0.05},
          {"--method quarot --activations 4 --calibration train.h5 --calibration-tokens 512", 0.5},
          {"--method rtn --activations 8", 0.2},
          {"--method rtn --activations 4 --group 8", 0.5}}) {
      SCOPED_TRACE(run + " " + flags);
      const nlohmann::json said = succeeds("quantize " + run + " -o rows " + flags);
      const bool is_rotated = said.at("method") == "quarot";
      EXPECT_EQ(said.contains("hidden_block"), is_rotated);
      const auto config =
          nlohmann::json::parse(testing::read_bytes(e / "rows/config.json")).at("quantization_config");
      EXPECT_EQ(config.at("version"), 2);
      EXPECT_EQ(config.at("activation_bits"), said.at("activations"));
      EXPECT_EQ(config.at("activation_clip"), said.at("activations") == 4 ? 0.9 : 1.0);
      EXPECT_EQ(config.at("online_hadamards").size(), is_rotated ? 2U : 0U);
      if (said.contains("report")) {
        EXPECT_EQ(said.at("report").at("activations"), 4);
      }
      const double after = succeeds("eval rows --data train.valid.h5").at("loss");
      EXPECT_NEAR(after, before, most_loss);
      EXPECT_NE(after, before);
      EXPECT_NEAR(succeeds("eval rows --engine --data train.valid.h5").at("loss").get<double>(), after, 5e-3);
      EXPECT_EQ(succeeds("generate rows -p 'Mara lives' -n 20 --temperature 0").at("tokens").size(), 20U);
    }
  }
  const nlohmann::json bench = succeeds(
      "bench decode --preset d2 --vocab 512 --context 8 --steps 2 --variant mod --weights 4 --activations 8");
  EXPECT_EQ(bench.at("activations"), 8);
  expect_refusal(fathom_command(e, "bench decode --preset d2 --context 8 --activations 8"), 2,
                 {"--activations 8", "--weights"});
}

// Keys and values of few bits, with weights of few bits or alone.
TEST_F(Quantize, CachesOfFewBitsAreEvaluatedReportedAndServed) {
  for (const std::string run : {"dense", "mod"}) {
    SCOPED_TRACE(run);
    e.trained(run, run);
    const std::string on = " --data train.valid.h5", text = " -p 'Mara lives' -n 20 --temperature 0";
    const double before = succeeds("eval " + run + on).at("loss");
    double least = 1e9;
    for (const int kv : {8, 4}) {
      const nlohmann::json said = succeeds("quantize " + run + " -o few --method rtn --weights 16 --kv " +
                                           std::to_string(kv) + " --calibration train.h5 --key-means off");
      EXPECT_EQ(said.at("weights"), 16);
      EXPECT_EQ(said.at("key_means"), false);
      EXPECT_EQ(said.at("kv"), kv);
      EXPECT_EQ(said.at("quantizer"), "none");
      EXPECT_EQ(said.at("bytes"), said.at("bytes_before"));
      EXPECT_TRUE(said.at("report").at("matrices").empty());
      EXPECT_EQ(said.at("report").at("quantizer"), "none");
      EXPECT_EQ(said.at("report").at("kv"), kv);
      EXPECT_NE(said.at("report").at("after").at("loss"), said.at("report").at("before").at("loss"));
      const auto config =
          nlohmann::json::parse(testing::read_bytes(e / "few/config.json")).at("quantization_config");
      EXPECT_EQ(config.at("bits"), 16);
      EXPECT_EQ(config.at("kv_bits"), kv);
      EXPECT_TRUE(config.at("tensors").empty());
      const double after = succeeds("eval few" + on).at("loss");
      EXPECT_NE(after, before);
      EXPECT_NEAR(after, before, kv == 8 ? 0.01 : 0.1);
      const nlohmann::json served = succeeds("eval few --engine" + on);
      EXPECT_NEAR(served.at("loss").get<double>(), after, 1e-3);
      EXPECT_LT(served.at("cache_bytes").get<double>(), least);
      least = served.at("cache_bytes");
      EXPECT_EQ(succeeds("generate few" + text).at("tokens").size(), 20U);
      if (run == "mod") continue;  // where biases are shifted
      // The same while serving, of the model as it was; and the other way round.
      const std::string flag = " --kv " + std::to_string(kv);
      EXPECT_EQ(succeeds("eval dense --seq-len 32" + on + flag).at("loss"),
                succeeds("eval few --seq-len 32" + on).at("loss"));
      EXPECT_EQ(succeeds("generate dense" + text + flag).at("tokens"),
                succeeds("generate few" + text).at("tokens"));
      EXPECT_EQ(succeeds("eval few --seq-len 32 --kv 16" + on).at("loss"),
                succeeds("eval dense --seq-len 32" + on).at("loss"));
    }
    const double whole = succeeds("eval few --engine --kv 16" + on).at("cache_bytes");
    EXPECT_GT(whole, 3 * least);
    // By default keys lose their mean. The share of others that codes then change is another one.
    const nlohmann::json means =
        succeeds("quantize " + run + " -o means --method rtn --weights 16 --kv 4 --calibration train.h5");
    EXPECT_EQ(means.at("key_means"), true);
    EXPECT_EQ(means.at("report").at("key_means"), true);
    EXPECT_GT(means.at("bytes").get<double>(), means.at("bytes_before").get<double>());
    const double with_means = succeeds("eval means" + on).at("loss");
    EXPECT_NE(with_means, succeeds("eval few" + on).at("loss").get<double>());
    EXPECT_NEAR(with_means, before, 0.1);
    EXPECT_NEAR(succeeds("eval means --engine" + on).at("loss").get<double>(), with_means, 1e-3);
    if (run == "dense") {  // where no biases are shifted
      EXPECT_EQ(succeeds("eval means --seq-len 32 --kv 16" + on).at("loss"),
                succeeds("eval few --seq-len 32 --kv 16" + on).at("loss"));
    }
    EXPECT_EQ(succeeds("generate means" + text).at("tokens").size(), 20U);
    const nlohmann::json both = succeeds("quantize " + run + " -o both --method quarot --kv 4");
    EXPECT_EQ(both.at("key_means"), false);
    EXPECT_EQ(both.at("weights"), 4);
    EXPECT_EQ(both.at("kv"), 4);
    EXPECT_EQ(succeeds("generate both --invariant" + text).at("tokens").size(), 20U);
    // Queries and keys are transformed in the pass and where the cache is read.
    EXPECT_NEAR(succeeds("eval both --engine" + on).at("loss").get<double>(),
                succeeds("eval both" + on).at("loss").get<double>(), 1e-3);
    expect_refusal(fathom_command(e, "quantize few -o out --method rtn"), 1,
                   {"few", "keys and values of 4 bits", "before it was quantized"});
  }
  const Outcome shown = fathom_command(e, "quantize mod -o few --method rotate-only --kv 4");
  EXPECT_EQ(shown.status, 0) << shown.err;
  EXPECT_THAT(shown.out, ::testing::HasSubstr("keys and values in 4 bits"));
  const std::string bench = "--preset d2 --vocab 512 --context 40 --steps 2 --variant mod --kv ";
  const nlohmann::json four = succeeds("bench decode " + bench + "4 --random-cache"),
                       sixteen = succeeds("bench decode " + bench + "16");
  EXPECT_EQ(four.at("kv"), 4);
  EXPECT_LT(four.at("least_bytes").get<double>(), sixteen.at("least_bytes").get<double>());
  EXPECT_LT(3 * four.at("cache_bytes").get<double>(), sixteen.at("cache_bytes").get<double>());
  EXPECT_EQ(succeeds("bench prefill " + bench + "8").at("kv"), 8);
  for (const std::string command : {"quantize mod -o out --method rtn", "eval mod", "generate mod -p a"})
    expect_refusal(fathom_command(e, command + " --kv 5"), 2, {"--kv"});
  for (const std::string flags : {"--kv 4", "--weights 8 --calibration train.h5"})
    expect_refusal(fathom_command(e, "quantize mod -o out --method rtn --key-means on " + flags), 2,
                   {"--key-means on", "--kv 4 or 8", "--calibration"});
  expect_refusal(fathom_command(e, "quantize mod -o out --method rtn --kv 4 --key-means few"), 2,
                 {"--key-means"});
  expect_refusal(fathom_command(e, "quantize mod -o out --method rtn --weights 16 --kv 16"), 2,
                 {"rtn", "--weights 16", "--kv"});
  expect_refusal(fathom_command(e, "quantize mod -o out --method rtn --weights 16 --kv 4 --group 8"), 2,
                 {"--group", "--weights 16"});
  expect_refusal(
      fathom_command(e, "quantize mod -o out --method rtn --weights 16 --kv 4 --gptq --calibration train.h5"),
      2, {"--gptq", "--weights 16"});
  EXPECT_FALSE(std::filesystem::exists(e / "out"));
}

TEST_F(Quantize, VerboseSaysWhatABlockTook) {
  e.trained("dense", "dense");
  const std::string command = "quantize dense -o few --method quarot --calibration train.h5 --json";
  EXPECT_THAT(fathom_command(e, command).err, ::testing::Not(::testing::HasSubstr(" took ")));
  const Outcome said = fathom_command(e, command + " --verbose");
  EXPECT_EQ(said.status, 0) << said.err;
  EXPECT_TRUE(said.json().contains("report"));
  EXPECT_THAT(said.err, ::testing::HasSubstr("block 1: what its products read took "));
}

// On a calibration: GPTQ, what it cost, and the same once more.
TEST_F(Quantize, ACalibratedModelIsReportedEvaluatedAndGenerates) {
  for (const std::string run : {"dense", "mod", "mode"}) {
    SCOPED_TRACE(run);
    // So that what is decided causally is not all the same.
    e.trained(run, run, run == "dense" ? "" : "--set routing.capacity=0.5 --set train.steps=120");
    const std::string command = "quantize " + run + " --method quarot --calibration train.h5";
    const nlohmann::json said = succeeds(command + " -o " + run + "-4");
    const auto report = nlohmann::json::parse(testing::read_bytes(e / (run + "-4/quantization_report.json")));
    EXPECT_EQ(said.at("report"), report);
    EXPECT_EQ(report.at("quantizer"), "gptq");
    EXPECT_LT(report.at("bytes").get<double>(), 0.8 * report.at("bytes_before").get<double>());
    const nlohmann::json& calibration = report.at("calibration");
    EXPECT_EQ(calibration.at("sequence"), 32);
    EXPECT_GE(calibration.at("tokens").get<int>(), 32768);
    EXPECT_GE(calibration.at("held_out_tokens").get<int>(), 2048);
    EXPECT_NEAR(report.at("after").at("loss").get<double>(), report.at("before").at("loss").get<double>(),
                0.1);
    EXPECT_NE(report.at("after").at("loss"), report.at("before").at("loss"));
    const nlohmann::json& matrices = report.at("matrices");
    EXPECT_EQ(matrices.size(), run == "mode" ? 4 * (2 + 2 * 2) : 16U);
    for (const nlohmann::json& m : matrices) {
      EXPECT_EQ(m.at("quantizer"), "gptq");
      EXPECT_GT(m.at("weight_error").get<double>(), 0.01);
      EXPECT_LT(m.at("output_error").get<double>(), 0.1);
      EXPECT_EQ(m.contains("expert"),
                m.at("parameter").get<std::string>().find("experts") != std::string::npos);
    }
    EXPECT_EQ(matrices[0].at("tokens"), calibration.at("tokens"));
    EXPECT_EQ(report.at("thresholds").size(), run == "dense" ? 0U : run == "mod" ? 2 : 2 + 4 * 2);
    for (const nlohmann::json& d : report.at("decisions")) {
      EXPECT_NEAR(d.at("share_after").get<double>(), d.at("share_before").get<double>(), 0.02);
      EXPECT_LT(d.at("flipped").get<double>(), 0.1);
    }
    const nlohmann::json after = succeeds("eval " + run + "-4 --seq-len 32 --data train.valid.h5"),
                         before = succeeds("eval " + run + " --data train.valid.h5");
    EXPECT_NEAR(after.at("loss").get<double>(), before.at("loss").get<double>(), 0.1);
    EXPECT_EQ(succeeds("generate " + run + "-4 -p 'Mara lives' -n 20 --temperature 0").at("tokens").size(),
              20U);
    // A folder with a report is replaced as any other, by the same bytes. (Of other threads they need not be
    // the same: OpenBLAS has kernels whose sums go by how many there are, its Haswell ones.)
    const std::string weights = testing::read_bytes(e / (run + "-4/model.safetensors")),
                      text = testing::read_bytes(e / (run + "-4/quantization_report.json"));
    succeeds(command + " -o " + run + "-4");
    EXPECT_EQ(testing::read_bytes(e / (run + "-4/model.safetensors")), weights);
    EXPECT_EQ(testing::read_bytes(e / (run + "-4/quantization_report.json")), text);
  }
  // Less is lost of the outputs than by rounding, measured on the same tokens.
  const auto lost = [&](const std::string& flags) {
    double sum = 0;
    const nlohmann::json said =
        succeeds("quantize mod -o few --calibration train.h5 --calibration-tokens 4096 " + flags);
    for (const nlohmann::json& m : said.at("report").at("matrices"))
      sum += m.at("output_error").get<double>();
    return sum;
  };
  const double rtn = lost("--method rtn"), gptq = lost("--method rtn --gptq --act-order --damping 0.02");
  EXPECT_LT(gptq, 0.8 * rtn);
  const auto config = nlohmann::json::parse(testing::read_bytes(e / "few/config.json"));
  EXPECT_EQ(config.at("quantization_config").at("method"), "gptq");
  const nlohmann::json plain = succeeds("quantize mod -o few --method quarot --rtn");
  EXPECT_FALSE(plain.contains("report"));
  EXPECT_FALSE(std::filesystem::exists(e / "few/quantization_report.json"));
  const Outcome shown = fathom_command(e,
                                       "quantize dense -o few --method quarot --calibration train.h5 "
                                       "--calibration-tokens 40 --no-refit-thresholds");
  EXPECT_EQ(shown.status, 0) << shown.err;
  EXPECT_THAT(shown.err, ::testing::HasSubstr("block 4 of 4"));
  EXPECT_THAT(shown.out, ::testing::HasSubstr("layers.3.mlp.down_proj.weight"));
  EXPECT_THAT(shown.out,
              ::testing::HasSubstr("layers.3.mlp.down_proj.weight saw 32 tokens, fewer than its 64 columns"));
  EXPECT_THAT(shown.out, ::testing::Not(::testing::HasSubstr("bias shifted")));
}

// Routers that decide by their own logits have no bias: the folder gets another threshold.
TEST_F(Quantize, OneThresholdIsFittedWhereRoutersDecide) {
  e.trained("mod", "run", "--set routing.causal.method=aux --set routing.capacity=0.5 --set train.steps=120");
  const std::string command = "quantize run --method rtn --calibration train.h5 --calibration-tokens 8192 ";
  const nlohmann::json report = succeeds(command + "-o fitted").at("report"),
                       left = succeeds(command + "-o left --no-refit-thresholds").at("report");
  EXPECT_TRUE(left.at("thresholds").empty());
  EXPECT_TRUE(left.at("warnings").empty());
  ASSERT_EQ(report.at("thresholds").size(), 1U);
  EXPECT_TRUE(report.at("warnings").empty());
  EXPECT_THAT(report.at("notes").dump(), ::testing::HasSubstr("one threshold of the config"));
  const auto threshold_of = [&](const std::string& folder) {
    const auto config = nlohmann::json::parse(testing::read_bytes(e / (folder + "/config.json")));
    return config.at("fathom_routing").at("causal").at("threshold").get<double>();
  };
  EXPECT_EQ(threshold_of("left"), 0.5);
  EXPECT_NE(threshold_of("fitted"), 0.5);
  EXPECT_EQ(threshold_of("fitted"), report.at("thresholds")[0].at("threshold").get<double>());
  // What is reported of the folder is what it does.
  const auto capacities = [&](const char* folder) {
    return succeeds(std::string("eval ") + folder + " --seq-len 32 --data train.valid.h5")
        .at("realised_capacity");
  };
  EXPECT_NE(capacities("fitted"), capacities("left"));
}

// Whatever ends the work leaves the folder as it was.
TEST_F(Quantize, AnInterruptedOneLeavesTheFolderAsItWas) {
  e.trained("dense", "run");
  const std::string command = "quantize run -o out --method quarot --calibration train.h5";
  testing::Background work(e, command);
  std::this_thread::sleep_for(std::chrono::milliseconds(40));
  work.signal(SIGINT);
  const Outcome ended = work.wait();
  EXPECT_TRUE(ended.status != 0 || std::filesystem::exists(e / "out/config.json")) << ended.status;
  EXPECT_EQ(std::filesystem::exists(e / "out"), ended.status == 0);
  expect_refusal(fathom_command(e, command, "ulimit -f 4;"), 1, {"out"});
  EXPECT_EQ(std::filesystem::exists(e / "out"), ended.status == 0);
  std::filesystem::create_directory(e / "mine");
  testing::write_bytes(e / "mine/notes", "notes");
  expect_refusal(fathom_command(e, "quantize run -o mine --method quarot --calibration train.h5"), 1,
                 {"mine", "other things"});
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
  expect_refusal(fathom_command(e, "quantize run -o out --method rotate-only --activations 8"), 2,
                 {"--activations 8", "rotate-only"});
  expect_refusal(fathom_command(e, "quantize run -o out --method quarot --activations 5"), 2,
                 {"--activations"});
  EXPECT_FALSE(std::filesystem::exists(e / "out"));
  const std::string four = "quantize run -o out --method quarot ";
  expect_refusal(fathom_command(e, four + "--calibration bpe.h5"), 1, {"bpe.h5", "tokenizer"});
  expect_refusal(fathom_command(e, four + "--calibration train.h5 --calibration-tokens 31"), 1,
                 {"31", "one sequence of 32"});
  expect_refusal(fathom_command(e, four + "--calibration train.h5 --calibration-tokens 10000000"), 1,
                 {"train.h5 has", "needs 100", "held out", "Ask for"});
  testing::write_bytes(e / "short.jsonl", R"({"text": "Too short for two sequences."})");
  EXPECT_EQ(fathom_command(e, "data prepare short.jsonl -o short.h5").status, 0);
  expect_refusal(fathom_command(e, four + "--calibration short.h5"), 1,
                 {"short.h5 has 29 tokens", "sequences of 32 needs 65"});
  expect_refusal(fathom_command(e, four + "--gptq"), 2, {"--gptq", "--calibration"});
  expect_refusal(fathom_command(e, four + "--gptq --rtn --calibration train.h5"), 2, {"--rtn", "--gptq"});
  expect_refusal(fathom_command(e, four + "--calibration-tokens 64"), 2, {"--calibration-tokens", "STORE"});
  expect_refusal(fathom_command(e, four + "--refit-thresholds"), 2, {"--refit-thresholds", "STORE"});
  expect_refusal(fathom_command(e, four + "--no-refit-thresholds"), 2, {"--no-refit-thresholds", "STORE"});
  expect_refusal(fathom_command(e, four + "--act-order"), 2, {"--act-order", "Give --calibration"});
  expect_refusal(fathom_command(e, four + "--damping 0.01"), 2, {"--damping", "Give --calibration"});
  expect_refusal(fathom_command(e, four + "--calibration ''"), 2, {"--calibration", "empty"});
  expect_refusal(fathom_command(e, "quantize run -o out --method rtn --seed 3"), 2, {"--seed"});
  // Before the work, which has a line for each block.
  const std::pair<const char*, const char*> early[] = {{"-o text.jsonl/out", "text.jsonl/out"},
                                                       {"-o out --tokenizer nowhere.model", "nowhere.model"},
                                                       {"-o out --group 7", "groups of 7"}};
  for (const auto& [place, named] : early) {
    const Outcome refused =
        fathom_command(e, std::string("quantize run --method quarot --calibration train.h5 ") + place);
    EXPECT_NE(refused.status, 0);
    EXPECT_THAT(refused.err, ::testing::HasSubstr(named));
    EXPECT_THAT(refused.err, ::testing::Not(::testing::HasSubstr("quantizing block")));
  }
  // Not onto itself: what it was would be lost.
  EXPECT_EQ(fathom_command(e, "export run -o whole").status, 0);
  const std::string bytes = testing::read_bytes(e / "whole/model.safetensors");
  expect_refusal(fathom_command(e, "quantize whole -o whole --method rtn"), 2, {"whole", "is an input"});
  EXPECT_EQ(testing::read_bytes(e / "whole/model.safetensors"), bytes);
  expect_refusal(fathom_command(e, "quantize run -o out --method rotate-only --rtn"), 2, {"--rtn"});
  EXPECT_FALSE(std::filesystem::exists(e / "out"));
  expect_refusal(fathom_command(e, "quantize run -o out --method rtn --weights 5"), 2, {"--weights"});
  expect_refusal(fathom_command(e, "quantize nowhere -o out --method gptq"), 2, {"--method", "rotate-only"});
  expect_refusal(fathom_command(e, "quantize nowhere -o out"), 2, {"--method"});
}

}  // namespace
}  // namespace fathom
