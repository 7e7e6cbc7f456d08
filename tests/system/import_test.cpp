// fathom import as its users meet it: what it writes and says, what it refuses, and that models of
// transformers compute the same here.
#include <algorithm>
#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/system/cli.h"
#include "tests/system/python.h"

namespace fathom {
namespace {

using ::testing::ElementsAre;
using testing::expect_refusal;
using testing::Experiment;
using testing::fathom_command;
using ::testing::HasSubstr;
using testing::Outcome;
using testing::read_bytes;
using testing::write_bytes;

class Import : public ::testing::Test {
 protected:
  nlohmann::json succeeds(const std::string& arguments) const {
    const Outcome outcome = fathom_command(e, arguments + " --json");
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    return outcome.json();
  }
  /// The folder `theirs`: an export that says nothing of Fathom.
  void make_foreign(const std::string& sets = "", const std::string& flags = "") const {
    e.trained("dense", "run", sets);
    succeeds("export run -o theirs" + flags);
    nlohmann::json config = nlohmann::json::parse(read_bytes(e / "theirs/config.json"));
    config.erase("fathom");
    write_bytes(e / "theirs/config.json", config.dump());
  }

  Experiment e;
};

TEST_F(Import, AModelOfOthersBecomesOurs) {
  make_foreign("--set model.tie_embeddings=true", " --precision bf16");
  write_bytes(e / "theirs/chat_template.jinja", "{{ messages }}");
  write_bytes(e / "theirs/README.md", "not a part of it");
  const nlohmann::json imported = succeeds("import theirs -o ours");
  EXPECT_EQ(imported.at("model_type"), "llama");
  EXPECT_EQ(imported.at("precision"), "bf16");
  EXPECT_EQ(imported.at("tied"), true);
  EXPECT_EQ(imported.at("bytes"), 2 * imported.at("parameters").get<double>());
  EXPECT_EQ(imported.at("tokenizer").at("kind"), "bpe");
  EXPECT_THAT(imported.at("files"),
              ElementsAre("model.safetensors", "chat_template.jinja", "config.json", "generation_config.json",
                          "tokenizer.json", "tokenizer_config.json"));
  for (const std::string name :
       {"model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}) {
    EXPECT_EQ(read_bytes(e / ("ours/" + name)), read_bytes(e / ("theirs/" + name))) << name;
  }
  const nlohmann::json own = nlohmann::json::parse(read_bytes(e / "ours/config.json")).at("fathom");
  EXPECT_EQ(own.at("tokenizer_kind"), "bpe");
  EXPECT_EQ(own.at("tokenizer_hash"), imported.at("tokenizer").at("hash"));
  const std::string ask = " -p 'Mara lives' -n 8 --temperature 0";
  EXPECT_EQ(succeeds("generate theirs" + ask).at("tokens"), succeeds("generate ours" + ask).at("tokens"));
  // Again, at the same place and from what it made itself.
  EXPECT_EQ(succeeds("import theirs -o ours --precision fp32").at("precision"), "fp32");
  EXPECT_EQ(succeeds("import ours -o again").at("files"), imported.at("files"));
  const Outcome said = fathom_command(e, "import theirs -o ours");
  EXPECT_EQ(said.status, 0) << said.err;
  EXPECT_THAT(said.out, ::testing::AllOf(HasSubstr("llama of "), HasSubstr("tied"), HasSubstr("context"),
                                         HasSubstr("bpe")));
}

TEST_F(Import, WhatEndsATextIsRead) {
  make_foreign();
  const std::string ask = " -p 'Mara lives' -n 8 --temperature 0";
  const nlohmann::json all = succeeds("generate theirs" + ask).at("tokens");
  ASSERT_EQ(all.size(), 8U);
  const auto stop = std::find_if(all.begin(), all.end(), [&](const auto& id) { return id != all[0]; });
  ASSERT_NE(stop, all.end());
  const auto before = nlohmann::json(std::vector<nlohmann::json>(all.begin(), stop));
  const auto expect_stop = [&](const std::string& model) {
    const nlohmann::json said = succeeds("generate " + model + ask);
    EXPECT_EQ(said.at("finish_reason"), "stop") << model;
    EXPECT_EQ(said.at("tokens"), before) << model;
  };
  // One id of the model's config; a list of the generation's, which goes first; ids that no text has mean
  // nothing.
  nlohmann::json config = nlohmann::json::parse(read_bytes(e / "theirs/config.json"));
  config["eos_token_id"] = *stop;
  write_bytes(e / "theirs/config.json", config.dump());
  std::filesystem::remove(e / "theirs/generation_config.json");
  expect_stop("theirs");
  succeeds("import theirs -o ours");
  expect_stop("ours");
  EXPECT_EQ(nlohmann::json::parse(read_bytes(e / "ours/generation_config.json")).at("eos_token_id"), *stop);
  const std::string list = nlohmann::json{{"eos_token_id", {*stop, 250, 99999}}, {"temperature", 0.6}}.dump();
  config["eos_token_id"] = 250;
  write_bytes(e / "theirs/config.json", config.dump());
  write_bytes(e / "theirs/generation_config.json", list);
  expect_stop("theirs");
  succeeds("import theirs -o ours");
  expect_stop("ours");
  EXPECT_EQ(read_bytes(e / "ours/generation_config.json"), list);
  EXPECT_EQ(nlohmann::json::parse(read_bytes(e / "ours/config.json")).at("eos_token_id"),
            nlohmann::json({*stop, 250}));
  for (const char* bad :
       {"[", "[]", R"({"eos_token_id":"x"})", R"({"eos_token_id":[1,[2]]})", R"({"bos_token_id":1.5})"}) {
    write_bytes(e / "theirs/generation_config.json", bad);
    expect_refusal(fathom_command(e, "import theirs -o other"), 1, {"generation_config.json"});
  }
}

TEST_F(Import, ATokenizerThatIsNotReadIsKept) {
  make_foreign();
  write_bytes(e / "theirs/tokenizer.json", R"({"model":{"type":"Unigram"}})");
  const Outcome outcome = fathom_command(e, "import theirs -o ours --json");
  EXPECT_EQ(outcome.status, 0);
  EXPECT_THAT(outcome.err, ::testing::AllOf(HasSubstr("Warning"), HasSubstr("Unigram")));
  EXPECT_TRUE(nlohmann::json::parse(outcome.out).at("tokenizer").is_null());
  EXPECT_EQ(read_bytes(e / "ours/tokenizer.json"), read_bytes(e / "theirs/tokenizer.json"));
  expect_refusal(fathom_command(e, "generate ours -p Mara"), 1, {"ours/tokenizer.json", "Unigram"});
  EXPECT_EQ(succeeds("generate ours --prompt-ids 77,97 -n 3").at("tokens").size(), 3U);
}

TEST_F(Import, WhatIsNoModelIsRefused) {
  make_foreign();
  expect_refusal(fathom_command(e, "import run -o ours"), 1, {"run", "config.json"});
  expect_refusal(fathom_command(e, "import nowhere -o ours"), 1, {"nowhere", "config.json"});
  expect_refusal(fathom_command(e, "import theirs"), 2, {"--output"});
  expect_refusal(fathom_command(e, "import theirs -o ours --precision fp8"), 2, {"--precision"});
  expect_refusal(fathom_command(e, "import theirs -o theirs"), 2, {"theirs", "is an input"});
  const std::string weights = read_bytes(e / "theirs/model.safetensors");
  write_bytes(e / "theirs/model.safetensors", weights.substr(0, weights.size() - 4));
  expect_refusal(fathom_command(e, "import theirs -o ours"), 1, {"model.safetensors"});
  EXPECT_FALSE(std::filesystem::exists(e / "ours"));
}

TEST_F(Import, ModelsOfTransformersComputeTheSame) {
  const testing::Python python("torch, transformers, tokenizers, h5py");
  if (!python) GTEST_SKIP() << python.why_not();
  std::filesystem::create_directory(e / "models");
  const nlohmann::json models = python.says(e, "check_import.py", FATHOM_BINARY " " + (e / "models"));
  ASSERT_GE(models.size(), 9U);
  for (const auto& [name, model] : models.items()) {
    SCOPED_TRACE(name);
    EXPECT_LT(model.at("difference").get<double>(), 1e-5);
    EXPECT_GT(model.at("texts"), 20);
    EXPECT_TRUE(model.at("same_ids").get<bool>());
    EXPECT_EQ(model.at("prompt_tokens")[0], model.at("prompt_tokens")[1]);
    EXPECT_EQ(model.at("greedy")[0], model.at("greedy")[1]);
    const bool is_half = name == "llama_tied" || name == "qwen3";
    EXPECT_EQ(model.at("import").at("precision"), is_half ? "bf16" : "fp32");
    EXPECT_EQ(model.at("import").at("tied"), name.ends_with("_tied"));
  }
}

}  // namespace
}  // namespace fathom
