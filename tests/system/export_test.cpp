// fathom export as its users meet it: what it writes, that the same model comes back, and that transformers
// loads it.
#include <algorithm>
#include <filesystem>
#include <sstream>

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

class Export : public ::testing::Test {
 protected:
  nlohmann::json succeeds(const std::string& arguments) const {
    const Outcome outcome = fathom_command(e, arguments + " --json");
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    return outcome.json();
  }

  Experiment e;
};

TEST_F(Export, TheSameModelIsEvaluatedAndGoesOnAlike) {
  e.trained("mod", "run");
  const nlohmann::json exported = succeeds("export run -o model");
  EXPECT_EQ(exported.at("model_type"), "fathom");
  EXPECT_EQ(exported.at("loads_elsewhere"), false);
  EXPECT_THAT(exported.at("files"), ElementsAre("model.safetensors", "config.json", "generation_config.json",
                                                "tokenizer.json", "tokenizer_config.json"));
  const std::string eval = " --data train.valid.h5";
  nlohmann::json run = succeeds("eval run" + eval), model = succeeds("eval model" + eval);
  run.erase("checkpoint"), model.erase("checkpoint");
  EXPECT_EQ(run, model);
  const std::string ask = " -p 'Mara lives' -n 8 --temperature 0";
  EXPECT_EQ(succeeds("generate run" + ask).at("text"), succeeds("generate model" + ask).at("text"));
  const Outcome said = fathom_command(e, "export run -o model");
  EXPECT_EQ(said.status, 0) << said.err;
  EXPECT_THAT(said.out, HasSubstr("Only Fathom runs it"));
}

TEST_F(Export, ASentencePieceModelGoesAlong) {
  succeeds("tokenizer train text.jsonl --vocab 400 -o bpe.model");
  succeeds("data prepare text.jsonl --tokenizer bpe.model --valid-fraction 0.1 -o bpe.h5");
  e.trained("dense", "run",
            "--set data.train=bpe.h5 --set data.valid=bpe.valid.h5 --set data.tokenizer=bpe.model");
  succeeds("export run -o model");
  std::filesystem::rename(e / "run", e / "gone");
  std::filesystem::remove(e / "bpe.model");
  EXPECT_FALSE(
      succeeds("generate model -p 'Mara lives' -n 4 --temperature 0").at("text").get<std::string>().empty());
}

TEST_F(Export, ATokenizerJsonGoesAlong) {
  const auto cases = nlohmann::json::parse(testing::read_bytes(FATHOM_SOURCE_DIR "/tests/golden/bpe.json"));
  const auto llama3 =
      std::find_if(cases.begin(), cases.end(), [](const auto& c) { return c["name"] == "llama3"; });
  ASSERT_NE(llama3, cases.end());
  const std::string tokenizer = (*llama3)["tokenizer"].dump();
  testing::write_bytes(e / "bpe.json", tokenizer);
  const nlohmann::json inspected = succeeds("tokenizer inspect bpe.json --text 'Mara lives'");
  EXPECT_EQ(inspected.at("kind"), "bpe");
  EXPECT_EQ(inspected.at("round_trip"), true);
  succeeds("data prepare text.jsonl --tokenizer bpe.json --valid-fraction 0.1 -o bpe.h5");
  e.trained("dense", "run",
            "--set data.train=bpe.h5 --set data.valid=bpe.valid.h5 --set data.tokenizer=bpe.json");
  EXPECT_EQ(testing::read_bytes(e / "run/tokenizer.json"), tokenizer);
  std::filesystem::remove(e / "bpe.json");
  succeeds("export run -o model");
  EXPECT_EQ(testing::read_bytes(e / "model/tokenizer.json"), tokenizer);
  std::filesystem::rename(e / "run", e / "gone");
  const std::string ask = "generate model -n 4 --temperature 0 ";
  const nlohmann::json text = succeeds(ask + "-p 'Mara lives'");
  // As the tokenizer's own programs do, with the token that begins a text in front.
  std::string ids = inspected.at("bos").dump();
  for (const auto& id : inspected.at("ids")) ids += "," + id.dump();
  EXPECT_EQ(text.at("tokens"), succeeds(ask + "--prompt-ids " + ids).at("tokens"));
  // Of another program, the tokenizer is the one that lies there.
  nlohmann::json config = nlohmann::json::parse(testing::read_bytes(e / "model/config.json"));
  config.erase("fathom");
  testing::write_bytes(e / "model/config.json", config.dump());
  EXPECT_EQ(text.at("tokens"), succeeds(ask + "-p 'Mara lives'").at("tokens"));
  EXPECT_GT(succeeds("eval model --data bpe.valid.h5").at("loss"), 0);
  testing::write_bytes(e / "model/tokenizer.json", R"({"model":{"type":"Unigram"}})");
  expect_refusal(fathom_command(e, ask + "-p Mara"), 1, {"model/tokenizer.json", "Unigram"});
  EXPECT_EQ(succeeds(ask + "--prompt-ids " + ids).at("tokens"), text.at("tokens"));
}

// As a model of another program whose tokenizer Fathom does not read: its ids are enough.
TEST_F(Export, AModelOfAnotherProgramTakesIds) {
  e.trained("dense", "run");
  succeeds("export run -o model");
  nlohmann::json config = nlohmann::json::parse(testing::read_bytes(e / "model/config.json"));
  config.erase("fathom");
  testing::write_bytes(e / "model/config.json", config.dump());
  expect_refusal(fathom_command(e, "eval model --data train.valid.h5"), 1,
                 {"train.valid.h5", "bytes", "tokenizer"});
  std::string ids;  // 16 bits each
  for (const char c : testing::read_bytes(e / "text.jsonl").substr(0, 4000)) ids += std::string{c, '\0'};
  testing::write_bytes(e / "ids.bin", ids);
  succeeds("data prepare ids.bin --vocab-size 257 --end-of-document 256 -o ids.h5");
  EXPECT_GT(succeeds("eval model --data ids.h5").at("loss"), 0);
  EXPECT_EQ(succeeds("generate model --prompt-ids 77,97 -n 3 --temperature 0").at("tokens").size(), 3U);
}

TEST_F(Export, BadPlacesAreRefused) {
  e.trained("dense", "run");
  expect_refusal(fathom_command(e, "export run -o run"), 2, {"run", "is an input"});
  expect_refusal(fathom_command(e, "export none -o model"), 1, {"none", "does not exist"});
  expect_refusal(fathom_command(e, "export run -o text.jsonl/model"), 1,
                 {"text.jsonl/model", "Not a directory"});
  expect_refusal(fathom_command(e, "export run -o model --precision fp8"), 2, {"--precision"});
  succeeds("export run -o model");
  // Not onto itself, by whatever name: what it was would be lost.
  const std::string bytes = testing::read_bytes(e / "model/model.safetensors");
  std::filesystem::create_symlink(e / "model", e / "link");
  for (const char* names :
       {"model -o model/", "link -o model", "model/config.json -o model", "model -o link"})
    expect_refusal(fathom_command(e, std::string("export --precision bf16 ") + names), 2, {"is an input"});
  EXPECT_EQ(testing::read_bytes(e / "model/model.safetensors"), bytes);
  expect_refusal(fathom_command(e, Experiment::train("dense", "other", "--resume model")), 1,
                 {"model", "exported", "optimizer"});
}

TEST_F(Export, TransformersComputesTheSame) {
  const testing::Python python("torch, transformers, h5py");
  if (!python) GTEST_SKIP() << python.why_not();
  succeeds("tokenizer train text.jsonl --vocab 400 -o bpe.model");
  succeeds("data prepare text.jsonl --tokenizer bpe.model --valid-fraction 0.1 -o bpe.h5");
  struct Case {
    std::string name, model_class, tokenizer, sets;
  };
  const std::string bpe =
      "--set data.train=bpe.h5 --set data.valid=bpe.valid.h5 --set data.tokenizer=bpe.model";
  for (const Case& c :
       {Case{"llama", "LlamaForCausalLM", "bytes", ""},
        Case{"qwen3", "Qwen3ForCausalLM", "bpe.model",
             bpe + " --set model.qk_norm=true --set model.tie_embeddings=true"},
        Case{"wide", "Qwen3ForCausalLM", "bytes", "--set model.qk_norm=true --set model.head_dim=48"},
        Case{"longer", "LlamaForCausalLM", "bytes",
             "--set model.rope_scaling.kind=llama3 --set model.rope_scaling.factor=8 "
             "--set model.rope_scaling.original_max_seq_len=64"},
        Case{"linear", "LlamaForCausalLM", "bytes",
             "--set model.rope_scaling.kind=linear --set model.rope_scaling.factor=2.5"}}) {
    SCOPED_TRACE(c.name);
    e.trained("dense", c.name, "--set model.max_seq_len=256 " + c.sets);  // prompt and answer fit
    succeeds("export " + c.name + " -o " + c.name + "-model");
    const std::string ids = "77,97,114,97,32,108,105,118,101,115,32,105,110";
    succeeds("eval " + c.name + "-model --dump-logits " + c.name + ".h5 --prompt-ids " + ids);
    nlohmann::json texts = nlohmann::json::array();
    for (const std::string text :
         {"The sea, caf\u00e9\n\tand  12 ships \u2014 ok?\n\n", " Mara lives in Hull. ", "aaaaaaaa"}) {
      const nlohmann::json ours = succeeds("tokenizer inspect " + c.tokenizer + " --text '" + text + "'");
      texts.push_back({{"text", text}, {"ids", ours.at("ids")}});
    }
    testing::write_bytes(e / "texts.json", texts.dump());
    const nlohmann::json theirs = python.says(
        e, "check_export.py",
        (e / (c.name + "-model")) + " " + ids + " " + (e / (c.name + ".h5")) + " " + (e / "texts.json"));
    EXPECT_EQ(theirs.at("class"), c.model_class);
    EXPECT_LT(theirs.at("difference").get<double>(), 1e-5);
    EXPECT_TRUE(theirs.at("same_ids").get<bool>());
    EXPECT_TRUE(theirs.at("texts_come_back").get<bool>());
    const nlohmann::json ours =
        succeeds("generate " + c.name + "-model --prompt-ids " + ids + " -n 200 --temperature 0");
    EXPECT_EQ(ours.at("tokens"), theirs.at("greedy"));
  }
}

TEST_F(Export, TheReferenceInPythonComputesTheSame) {
  const testing::Python python("torch, h5py");
  if (!python) GTEST_SKIP() << python.why_not();
  const std::string ids = "77,97,114,97,32,108,105,118,101,115,32,105,110,32,72,117,108,108";
  std::string arguments = ids;
  int count = 0;
  const std::string predictor = " routing.causal.method=predictor", experts = " experts.count=3";
  for (const std::string& sets :
       {std::string("routing.causal.method=aux model.rope_scaling.kind=llama3 model.rope_scaling.factor=8 "
                    "model.rope_scaling.original_max_seq_len=64"),
        "routing.gate=tanh model.qk_norm=true" + predictor, "routing.kind=moe" + experts + predictor,
        "routing.kind=moe experts.choice=token" + experts,
        "routing.kind=mode_staged routing.gate=sigmoid" + experts + predictor,
        "routing.kind=mode_integrated experts.noop=2 model.tie_embeddings=true" + experts + predictor}) {
    const std::string name = "run" + std::to_string(count++);
    std::istringstream words(sets);
    std::string flags;
    for (std::string word; words >> word;) flags += " --set " + word;
    e.trained("mod", name, flags);
    succeeds("export " + name + " -o " + name + "-model");
    succeeds("eval " + name + "-model --dump-logits " + name + ".h5 --prompt-ids " + ids);
    arguments += " " + (e / (name + "-model")) + " " + (e / (name + ".h5"));
  }
  const nlohmann::json differences = python.says(e, "check_routed.py", arguments);
  ASSERT_EQ(differences.size(), static_cast<std::size_t>(count));
  for (const auto& difference : differences) EXPECT_LT(difference.get<double>(), 1e-5) << differences;
}

}  // namespace
}  // namespace fathom
