// The inference engine from the command line: texts computed together are the texts computed alone, and its
// loss on held-out text is the trainer's.
#include <cmath>
#include <sstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/system/cli.h"

namespace fathom {
namespace {

using testing::expect_refusal;
using testing::Experiment;
using testing::fathom_command;
using ::testing::HasSubstr;
using testing::Outcome;

class EngineCommands : public ::testing::Test {
 protected:
  std::vector<nlohmann::json> lines(const std::string& arguments, int status = 0) {
    const Outcome outcome = fathom_command(e, arguments);
    EXPECT_EQ(outcome.status, status) << outcome.err;
    err = outcome.err;
    std::istringstream in(outcome.out);
    std::vector<nlohmann::json> objects;
    for (std::string line; std::getline(in, line);) objects.push_back(nlohmann::json::parse(line));
    return objects;
  }
  Experiment e;
  std::string err;
};

TEST_F(EngineCommands, TextsTogetherAreTheTextsAlone) {
  e.trained("mod", "run");
  std::string file;
  const std::vector<std::string> prompts = {"Mara lives", "The", "a long house by the sea, ", "x"};
  for (int i = 0; i < 12; ++i)
    file += nlohmann::json{{"prompt", prompts[static_cast<std::size_t>(i) % 4] +
                                          std::string(1, static_cast<char>('a' + i))}}
                .dump() +
            "\n";
  testing::write_bytes(e / "prompts.jsonl", file);
  const std::string flags =
      " -n 15 --temperature 0.9 --top-k 40 --min-p 0.01 --seed 3 --json --logprobs --invariant";
  const auto together =
      lines("generate run --prompts prompts.jsonl --sequences 5 --chunk 7 --block 16" + flags);
  ASSERT_EQ(together.size(), 12U);
  EXPECT_THAT(err, HasSubstr("12 prompts"));
  // A cache that holds little more than one text: the others wait, and lose nothing.
  const auto narrow = lines(
      "generate run --prompts prompts.jsonl --sequences 5 --chunk 7 --block 16 --cache-gb 0.0003" + flags);
  ASSERT_EQ(narrow.size(), 12U);
  for (std::size_t i = 0; i < together.size(); ++i) {
    const std::string prompt = together[i].at("prompt");
    const auto alone = lines("generate run -p '" + prompt + "'" + flags);
    EXPECT_EQ(together[i].at("tokens"), alone.at(0).at("tokens")) << i;
    EXPECT_EQ(together[i].at("logprobs"), alone.at(0).at("logprobs")) << i;
    EXPECT_EQ(together[i].at("routed_fraction"), alone.at(0).at("routed_fraction")) << i;
    EXPECT_EQ(narrow[i].at("tokens"), together[i].at("tokens")) << i;
  }
}

TEST_F(EngineCommands, EvaluationIsTheTrainers) {
  for (const std::string kind : {"dense", "mod", "mode"}) {
    SCOPED_TRACE(kind);
    e.trained(kind, kind);
    const auto trainer = lines("eval " + kind + " --json").at(0);
    const auto engine = lines("eval " + kind + " --engine --json --chunk 50 --sequences 3").at(0);
    EXPECT_NEAR(engine.at("loss").get<double>(), trainer.at("loss").get<double>(), 1e-5);
    EXPECT_EQ(engine.at("tokens"), trainer.at("tokens"));
    EXPECT_NEAR(engine.at("bits_per_byte").get<double>(), trainer.at("bits_per_byte").get<double>(), 1e-5);
    if (kind != "dense") {
      EXPECT_EQ(engine.at("realised_capacity").size(), 2U);
    }
  }
}

TEST_F(EngineCommands, StopTextsAndBiases) {
  e.trained("dense", "run");
  // 'b' is all that can come; the text ends before the third.
  const auto stopped = lines(
                           "generate run -p a -n 20 --temperature 0 --logit-bias 98:1000 --stop zz --stop "
                           "bbb --json --top-logprobs 3")
                           .at(0);
  EXPECT_EQ(stopped.at("text"), "");
  EXPECT_EQ(stopped.at("finish_reason"), "stop");
  EXPECT_EQ(stopped.at("tokens").size(), 3U);
  EXPECT_EQ(stopped.at("top_logprobs").at(0).size(), 3U);
  const auto all =
      lines("generate run -p a -n 4 --temperature 0 --logit-bias 98:1000 --stop bbbbb --json").at(0);
  EXPECT_EQ(all.at("text"), "bbbb");
  EXPECT_EQ(all.at("finish_reason"), "length");
  const Outcome shown =
      fathom_command(e, "generate run -p a -n 4 --temperature 0 --logit-bias 98:1000 --stop bbbbb");
  EXPECT_EQ(shown.out, "abbbb\n");
}

TEST_F(EngineCommands, WhatCannotBeIsRefused) {
  e.trained("dense", "run");
  expect_refusal(fathom_command(e, "generate run -p a --block 24"), 2, {"--block 24", "multiple of 16"});
  expect_refusal(fathom_command(e, "generate run -p a --logit-bias 98"), 2, {"--logit-bias '98'"});
  expect_refusal(fathom_command(e, "generate run -p a --logit-bias 4294967368:-5"), 2, {"4294967368"});
  expect_refusal(fathom_command(e, "generate run -p a --logit-bias 300:1"), 1, {"token 300", "257"});
  // More than the program may have.
  expect_refusal(fathom_command(e, "generate run -p a --cache-gb 8", "ulimit -v 4000000;"), 1,
                 {"no memory for a cache"});
  expect_refusal(fathom_command(e, "generate run -p a --stop ''"), 2, {"--stop is empty"});
  expect_refusal(fathom_command(e, "generate run -p a --cache-gb 0.000001"), 1,
                 {"holds no token of this model"});
  testing::write_bytes(e / "prompts.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \"\"}\n{\"prompt\": \"" +
                                                std::string(200, 'x') + "\"}\n");
  const auto some = lines("generate run --prompts prompts.jsonl -n 3 --json", 1);
  ASSERT_EQ(some.size(), 3U);
  EXPECT_EQ(some[0].at("tokens").size(), 3U);
  EXPECT_THAT(some[1].at("error").get<std::string>(), HasSubstr("prompt is empty"));
  EXPECT_THAT(some[2].at("error").get<std::string>(), HasSubstr("context is"));
  EXPECT_THAT(err, HasSubstr("2 of 3 prompts"));
}

// Weights of bf16 are the weights of a bf16 export, whichever file they come from; and eval has one loss for
// both.
TEST_F(EngineCommands, WeightsOfBf16AreThoseOfABf16Export) {
  for (const std::string kind : {"dense", "mod"}) {
    SCOPED_TRACE(kind);
    e.trained(kind, kind);
    ASSERT_EQ(fathom_command(e, "export " + kind + " -o " + kind + "16 --precision bf16").status, 0);
    const std::string how =
        " -p 'Mara lives' -n 40 --temperature 0.9 --seed 5 --json --logprobs --precision ";
    const auto halves = lines("generate " + kind + how + "bf16").at(0);
    const auto exported = lines("generate " + kind + "16" + how + "fp32").at(0);
    EXPECT_EQ(halves.at("tokens"), exported.at("tokens"));
    // Norms and biases are fp32 here, and of bf16 in the file.
    for (std::size_t i = 0; i < halves.at("logprobs").size(); ++i)
      EXPECT_NEAR(halves["logprobs"][i].get<double>(), exported["logprobs"].at(i).get<double>(), 0.02) << i;
    const auto whole = lines("generate " + kind + how + "fp32").at(0);
    EXPECT_NE(halves.at("logprobs"), whole.at("logprobs"));
    const double loss = lines("eval " + kind + " --tokens 2000 --json --precision bf16").at(0).at("loss");
    const double of_fp32 = lines("eval " + kind + " --tokens 2000 --json").at(0).at("loss");
    EXPECT_NE(loss, of_fp32);
    EXPECT_NEAR(loss, of_fp32, 0.02);
  }
}

TEST_F(EngineCommands, BenchesSayWhatTheyAreHeldAgainst) {
  for (const std::string bench : {"decode", "prefill"}) {
    SCOPED_TRACE(bench);
    const auto line = lines("bench " + bench +
                            " --preset d2 --variant mod --vocab 512 --context 40 --batch 2 --steps 4 --json")
                          .at(0);
    EXPECT_EQ(line.at("bench"), bench);
    for (const char* key : {"ms", "tok_s", "share_of_ceiling"})
      EXPECT_GT(line.at(key).get<double>(), 0) << key;
    EXPECT_GT(line.at("routed_fraction").get<double>(), 0);
  }
  expect_refusal(fathom_command(e, "bench decode --preset d2 --kv-heads 3"), 2, {"--kv-heads 3"});
  // A random cache stands for a context that is not computed: one pass of the last token begins the text. Of
  // a long one the routers are fitted to some of its positions, and keep the capacity, 0.125, all the same.
  const auto filled = lines(
                          "bench decode --preset d2 --variant mod --vocab 512 --context 9000 --random-cache "
                          "--steps 64 --json")
                          .at(0);
  EXPECT_NEAR(filled.at("routed_fraction").get<double>(), 0.125, 0.1);
  EXPECT_EQ(filled.at("random_cache"), true);
  EXPECT_EQ(filled.at("whole_steps"), false);  // the CPU has none
  EXPECT_GT(filled.at("tok_s").get<double>(), 0);
}

// The same requests on a model and its routed twin: all are answered, and the twin's cache is smaller.
TEST_F(EngineCommands, RequestsOfMixedLengthsAreMeasured) {
  const auto run = [&](const std::string& variant) {
    return lines("bench requests --preset d2 --variant " + variant +
                 " --vocab 512 --requests 12 --sequences 5 --prompt-min 100 --prompt-max 300 --new-min 2 "
                 "--new-max 9 "
                 "--block 16 --json")
        .at(0);
  };
  const auto dense = run("dense"), mod = run("mod");
  EXPECT_EQ(dense.at("new_tokens"), mod.at("new_tokens"));
  EXPECT_EQ(dense.at("prompt_tokens"), mod.at("prompt_tokens"));
  EXPECT_GE(dense.at("new_tokens").get<int>(), 12 * 2);
  EXPECT_GE(dense.at("prompt_tokens").get<int>(), 12 * 100);
  EXPECT_LT(mod.at("cache_bytes").get<double>(), 0.75 * dense.at("cache_bytes").get<double>());
  EXPECT_GT(mod.at("routed_fraction").get<double>(), 0);
  expect_refusal(fathom_command(e, "bench requests --preset d2 --prompt-min 9 --prompt-max 8"), 2,
                 {"--prompt-min"});
}

}  // namespace
}  // namespace fathom
