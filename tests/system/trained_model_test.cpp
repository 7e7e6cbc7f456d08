// What a run folder carries to those that use its model: the tokenizer, and the row-invariant mode.
#include <algorithm>
#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "src/io/hdf5_file.h"
#include "tests/system/cli.h"

namespace fathom {
namespace {

namespace fs = std::filesystem;
using testing::expect_refusal;
using testing::Experiment;
using testing::fathom_command;
using testing::Outcome;
using testing::read_bytes;
using testing::write_bytes;

class RunTokenizer : public ::testing::Test {
 protected:
  void SetUp() override {
    succeeds("tokenizer train text.jsonl --vocab 400 -o bpe.model");
    succeeds("data prepare text.jsonl --tokenizer bpe.model --valid-fraction 0.1 -o bpe.h5");
    e.trained("mod", "run", kSets);
  }
  void succeeds(const std::string& arguments) const {
    const Outcome outcome = fathom_command(e, arguments);
    ASSERT_EQ(outcome.status, 0) << outcome.err;
  }
  void refused(const std::string& arguments, std::initializer_list<std::string> words) const {
    expect_refusal(fathom_command(e, arguments), 1, words);
  }

  static constexpr const char* kSets =
      "--set data.train=bpe.h5 --set data.valid=bpe.valid.h5 --set data.tokenizer=bpe.model";
  static constexpr const char* kAsk = " -p 'Mara lives' -n 4 --temperature 0 --json";
  Experiment e;
};

TEST_F(RunTokenizer, EvaluationIsOfTheTrainingsOwnValidationStoreUnlessToldOtherwise) {
  const auto own = fathom_command(e, "eval run --tokens 64 --json").json();
  EXPECT_EQ(own, fathom_command(e, "eval run --data bpe.valid.h5 --tokens 64 --json").json());
  e.trained("mod", "blind", std::string(kSets) + " --set data.valid=");
  expect_refusal(fathom_command(e, "eval blind"), 2, {"no validation text (data.valid)", "--data"});
}

// The model's vocabulary is padded (400 -> 448), and token 1 ends a document: only the tokenizer knows both.
TEST_F(RunTokenizer, APromptOfIdsIsGoneOnFromByTheTokenizersRulesToo) {
  const std::string ask = "generate run --prompt-ids 389 -n 60 --temperature 50 --json --seed ";
  const auto ids = [&](const std::string& more) {
    std::vector<int> all;
    for (int seed = 1; seed <= 4; ++seed) {
      const auto json = fathom_command(e, ask + std::to_string(seed) + more).json();
      for (const int id : json.at("tokens")) all.push_back(id);
    }
    return all;
  };
  const std::vector<int> known = ids("");
  EXPECT_LT(std::ranges::max(known), 400);
  EXPECT_EQ(std::ranges::count(known, 1), 0);
  EXPECT_TRUE(fathom_command(e, ask + "1").json().at("text").is_string());
  // Without one the ids are all there is, and a line says so.
  fs::remove(e / "run/tokenizer.model");
  fs::rename(e / "bpe.model", e / "other.model");
  EXPECT_GE(std::ranges::max(ids("")), 400) << "or this test shows nothing";
  EXPECT_LT(std::ranges::max(ids(" --tokenizer other.model")), 400);
  const Outcome bare = fathom_command(e, ask + "1");
  EXPECT_TRUE(bare.json().at("text").is_null());
  EXPECT_THAT(bare.err,
              ::testing::AllOf(::testing::HasSubstr("Warning: "), ::testing::HasSubstr("bpe.model")));
  EXPECT_EQ(std::ranges::count(bare.err, '\n'), 1);
  // One that is named must be there.
  refused("generate run --prompt-ids 1 --tokenizer absent", {"absent"});
}

TEST_F(RunTokenizer, AMovedRunWritesAndIsEvaluatedWithoutTheOriginal) {
  const std::string model = read_bytes(e / "bpe.model");
  EXPECT_EQ(read_bytes(e / "run/tokenizer.model"), model);
  EXPECT_FALSE(fs::exists(e / "run/tokenizer.model.tmp"));
  const auto before = fathom_command(e, "generate run" + std::string(kAsk)).json();
  fs::create_directory(e / "elsewhere");
  fs::rename(e / "run", e / "elsewhere/moved");
  fs::remove(e / "bpe.model");
  const auto after = fathom_command(e, "generate elsewhere/moved" + std::string(kAsk)).json();
  EXPECT_EQ(after.at("tokens"), before.at("tokens"));
  EXPECT_EQ(after.at("text"), before.at("text"));
  // A checkpoint finds the copy of the run that it lies in, whatever the path to it looks like.
  EXPECT_EQ(fathom_command(e, "generate " + e.newest_checkpoint("elsewhere/moved") + kAsk).json().at("text"),
            before.at("text"));
  const std::string name = fs::path(e.newest_checkpoint("elsewhere/moved")).filename();
  EXPECT_EQ(
      fathom_command(e, "generate ./" + name + kAsk, "cd elsewhere/moved/checkpoints;").json().at("text"),
      before.at("text"));
  succeeds("eval elsewhere/moved --data bpe.valid.h5 --tokens 64");
}

TEST_F(RunTokenizer, AMovedRunGoesOnWithItsOwnCopy) {
  const auto train = [&](const std::string& more) {
    return fathom_command(e, Experiment::train("mod", "moved", kSets + more));
  };
  const std::string model = read_bytes(e / "bpe.model");
  fs::rename(e / "run", e / "moved");
  fs::remove(e / "bpe.model");
  const Outcome done = train("");
  EXPECT_EQ(done.status, 0) << done.err;
  EXPECT_THAT(done.err, ::testing::HasSubstr("moved is done"));
  EXPECT_EQ(train(" --dry-run").status, 0);
  // As if stopped before the end, and from the config that the run folder holds, twice: it names the copy
  // then.
  for (const char* const name : {"moved", "again"}) {
    if (std::string(name) == "again") fs::rename(e / "moved", e / "again");
    fs::remove(e.newest_checkpoint(name));
    const std::string folder = name;
    const Outcome resumed =
        fathom_command(e, "train " + folder + "/config.yaml --threads 1 --run-dir " + folder);
    EXPECT_EQ(resumed.status, 0) << resumed.err;
    EXPECT_THAT(resumed.err, ::testing::HasSubstr("resume at step 35"));
    EXPECT_THAT(resumed.err, ::testing::HasSubstr(folder + "/tokenizer.model"));
    EXPECT_EQ(read_bytes(e / (folder + "/tokenizer.model")), model);
  }
  fs::rename(e / "again", e / "moved");
  // Not when it is not the stores' tokenizer, nor where there is none.
  expect_refusal(train(" --set data.train=train.h5 --set data.valid=train.valid.h5"), 1,
                 {"moved/tokenizer.model", "another tokenizer", "train.h5"});
  expect_refusal(fathom_command(e, Experiment::train("mod", "new", kSets)), 1, {"bpe.model"});
}

TEST_F(RunTokenizer, EvaluationElsewhereSaysWhoseStoreIsMissing) {
  fs::create_directory(e / "elsewhere");
  for (const std::string& path : {e / "run", e.newest_checkpoint("run")}) {
    expect_refusal(fathom_command(e, "eval " + path, "cd elsewhere;"), 1,
                   {"bpe.valid.h5 (data.valid of its training)", "No such file", "Give --data STORE."});
  }
  expect_refusal(fathom_command(e, "eval run --data absent.h5"), 1, {"absent.h5", "No such file"});
}

TEST_F(RunTokenizer, ADamagedCopyIsNamedAndTheNextStartHealsIt) {
  const std::string model = read_bytes(e / "bpe.model");
  std::string damaged = model;
  damaged[damaged.size() / 2] ^= 1;
  for (const std::string& bytes : {damaged, model.substr(0, model.size() / 2), std::string()}) {
    write_bytes(e / "run/tokenizer.model", bytes);
    refused("generate run" + std::string(kAsk), {"run/tokenizer.model", "damaged", "--tokenizer PATH"});
  }
  succeeds("generate run --tokenizer bpe.model" + std::string(kAsk));
  e.trained("mod", "run2", std::string(kSets) + " --set train.steps=2");
  write_bytes(e / "run2/tokenizer.model", damaged);
  fs::remove_all(e / "run2/checkpoints");
  e.trained("mod", "run2", std::string(kSets) + " --set train.steps=2");
  EXPECT_EQ(read_bytes(e / "run2/tokenizer.model"), model);
}

TEST_F(RunTokenizer, ARunWithoutACopyUsesWhatItsConfigNames) {
  fs::remove(e / "run/tokenizer.model");
  succeeds("generate run" + std::string(kAsk));
  fs::rename(e / "bpe.model", e / "other.model");
  refused("generate run" + std::string(kAsk), {"bpe.model", "data.tokenizer", "--tokenizer PATH"});
  succeeds("generate run --tokenizer other.model" + std::string(kAsk));
  succeeds("tokenizer train text.jsonl --vocab 380 -o bpe.model");
  refused("generate run" + std::string(kAsk), {"bpe.model is another tokenizer", "--tokenizer PATH"});
}

TEST(ByteRun, HasNoTokenizerFile) {
  const Experiment e;
  e.trained("dense", "run", "--set train.steps=2 --set data.tokenizer=bytes");
  EXPECT_FALSE(fs::exists(e / "run/tokenizer.model"));
}

// Row-invariant and fast products of a single row differ in the last bits, so logits tell which were used.
TEST(RowInvariantRun, NeedsNoFlag) {
  const Experiment e;
  const auto logits = [&](const std::string& run, const std::string& flags) {
    const Outcome outcome = fathom_command(e, "eval " + run + " --dump-logits l.h5 --prompt-ids 77 " + flags);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    return H5Reader(e / "l.h5", "logits").read<float>("logits");
  };
  const auto logprobs = [&](const std::string& run, const std::string& flags) {
    return fathom_command(e, "generate " + run + " -p 'Mara lives' -n 8 --json --logprobs " + flags)
        .json()
        .at("logprobs");
  };
  e.trained("mod", "fast", "--set train.steps=20");
  EXPECT_NE(logits("fast", ""), logits("fast", "--invariant")) << "or this test shows nothing";
  EXPECT_NE(logprobs("fast", ""), logprobs("fast", "--invariant")) << "or this test shows nothing";
  e.trained("mod", "invariant", "--set train.steps=20 --set invariant=true");
  EXPECT_EQ(logits("invariant", ""), logits("invariant", "--invariant"));
  EXPECT_EQ(logprobs("invariant", ""), logprobs("invariant", "--invariant"));
}

}  // namespace
}  // namespace fathom
