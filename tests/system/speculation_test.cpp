// Speculative decoding from the command line: greedy texts are those without it, what it says of its levels
// adds up, and what cannot be is refused in one paragraph.
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

class SpeculativeCommands : public ::testing::Test {
 protected:
  nlohmann::json generate(const std::string& arguments) {
    const Outcome outcome = fathom_command(e, "generate " + arguments + " --json --threads 1");
    EXPECT_EQ(outcome.status, 0) << arguments << ": " << outcome.err;
    return outcome.status == 0 ? outcome.json() : nlohmann::json();
  }
  void refused(const std::string& arguments, int status, std::initializer_list<std::string> words) {
    SCOPED_TRACE(arguments);
    expect_refusal(fathom_command(e, "generate " + arguments), status, words);
  }
  Experiment e;
};

constexpr const char* kSmall = " --retrieval-budget 16 --retrieval-chunk 2 --draft-window 8 --draft-sinks 2";

TEST_F(SpeculativeCommands, GreedyTextsAreThoseWithoutIt) {
  for (const std::string kind : {"dense", "mod", "mode", "moe"}) e.trained(kind, kind);
  for (const std::string kind : {"dense", "mod", "mode", "moe"}) {
    const std::string text = kind + " -p 'Mara lives in' -n 30 --temperature 0 --invariant --block 16";
    const auto expected = generate(text);
    for (const std::string how :
         {"plain", "ngram", "ngram --gamma 4", "retrieval", "retrieval --gamma 3", "draft --draft dense",
          "triforce", "triforce --gamma 5 --gamma-between 2 --draft ngram",
          "triforce --draft dense --gamma 3", "retrieval --kv 16"}) {
      SCOPED_TRACE(kind + " " + how);
      const auto got =
          generate(text + " --speculate " + how + (how == "plain" || how[0] == 'n' ? "" : kSmall));
      for (const char* key : {"tokens", "text", "finish_reason", "prompt", "prompt_tokens"})
        EXPECT_EQ(got.at(key), expected.at(key)) << key;
      for (const char* key : {"routed_fraction", "expert_fraction"})
        EXPECT_EQ(got.contains(key), expected.contains(key)) << key;
      if (expected.contains("expert_fraction")) {
        EXPECT_EQ(got.at("expert_fraction").size(), expected.at("expert_fraction").size());
      }
      const auto& s = got.at("speculation");
      const auto& levels = s.at("levels");
      EXPECT_EQ(levels.back().at("name"), "target");
      EXPECT_EQ(levels.back().at("tokens"), got.at("tokens").size());
      EXPECT_LE(levels.back().at("accepted"), levels.back().at("tested"));
      EXPECT_GE(s.at("tokens_per_verification"), 1.0);
    }
  }
}

TEST_F(SpeculativeCommands, StopsInsideOfWhatWasAccepted) {
  e.trained("mod", "run");
  // 'b' is all that can come: every proposal of an n-gram is right.
  const std::string text =
      "run -p bbbbbb -n 20 --temperature 0 --logit-bias 98:1000 --speculate ngram --gamma 8 --stop ";
  const auto got = generate(text + "zz --stop bbbbbbbbbbb");
  EXPECT_EQ(got.at("finish_reason"), "stop");
  EXPECT_EQ(got.at("text"), "");
  EXPECT_EQ(got.at("tokens").size(), 11U);
  EXPECT_GT(got.at("speculation").at("levels").at(1).at("accepted"), 3);
  // Those behind it are nobody's.
  EXPECT_EQ(got.at("speculation").at("levels").at(1).at("tokens"), 11U);
  const Outcome shown = fathom_command(e, "generate " + text + "zz");
  EXPECT_EQ(shown.out, std::string(26, 'b') + "\n");
  EXPECT_THAT(shown.err, HasSubstr("tested proposals of ngram (100 %)"));
  const auto limited = generate(text + "zz");
  EXPECT_EQ(limited.at("tokens").size(), 20U);
  EXPECT_EQ(limited.at("finish_reason"), "length");
}

// What there is of it, and then the error.
TEST_F(SpeculativeCommands, ATextThatFailsIsWrittenAsFarAsItWent) {
  e.trained("dense", "run", "--set model.max_seq_len=512 --set train.seq_len=64");
  // A text that no end of a document cuts short.
  const std::string text =
      "generate run -p bbbbbb -n 400 --temperature 0 --logit-bias 98:1000 --block 16 --cache-gb 0.0004";
  for (const std::string how : {"plain", "ngram"}) {
    const Outcome outcome = fathom_command(e, text + " --json --threads 1 --speculate " + how);
    EXPECT_EQ(outcome.status, 1) << outcome.out;
    EXPECT_THAT(outcome.err, HasSubstr("Give the cache more memory"));
    const auto json = nlohmann::json::parse(outcome.out);
    EXPECT_EQ(json.at("finish_reason"), "error");
    EXPECT_THAT(json.at("error").get<std::string>(), HasSubstr("holds no more than"));
    EXPECT_GT(json.at("tokens").size(), 10U);
    EXPECT_EQ(json.at("speculation").at("levels").back().at("tokens"), json.at("tokens").size());
  }
}

TEST_F(SpeculativeCommands, SharedNoiseAndFixedNumbersRepeat) {
  e.trained("mod", "run");
  e.trained("dense", "small");
  const std::string text =
      "run -p 'The house' -n 25 --temperature 0.9 --top-p 0.95 --seed 5 --invariant --speculate ";
  const auto noise = generate(text + "plain --coupling gumbel").at("tokens");
  for (const std::string how : {"ngram", "draft --draft small", "triforce --gamma 4", "retrieval"})
    EXPECT_EQ(generate(text + how + " --coupling gumbel" + kSmall).at("tokens"), noise) << how;
  const std::string fixed = text + "triforce --gamma 4" + kSmall;
  EXPECT_EQ(generate(fixed).at("tokens"), generate(fixed).at("tokens"));
}

std::vector<nlohmann::json> lines_of(const std::string& text) {
  std::vector<nlohmann::json> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

TEST_F(SpeculativeCommands, TheBenchSaysWhatIsMeasuredAndWhatIsComposed) {
  const auto bench = [&](const std::string& arguments) {
    const Outcome outcome = fathom_command(e, "bench speculative --json --threads 1 " + arguments);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    return lines_of(outcome.out);
  };
  const std::string small = " --retrieval-budget 64 --draft-window 16 --draft-sinks 2 --gamma 4";
  for (const std::string variant : {"dense --draft d2", "mod"}) {
    const auto lines = bench(
        "--preset d2 --vocab 64 --context 200,300 --tokens 300 --steps 4 --kv-heads 1 "
        "--acceptance 1,0,0.5 --variant " +
        variant + small);
    ASSERT_EQ(lines.size(), 6U);
    for (const auto& line : lines) {
      EXPECT_EQ(line.at("kind"), "composed");
      EXPECT_GT(line.at("plain_ms"), 0);
      EXPECT_GT(line.at("speedup_by_formula"), 0);
      EXPECT_NEAR(line.at("speedup").get<double>() * line.at("ms").get<double>(),
                  line.at("plain_ms").get<double>(), 1e-6 * line.at("plain_ms").get<double>());
      EXPECT_EQ(line.at("levels").size(), line.at("method") == "triforce" ? 3U : 2U);
      const double a = line.at("levels").back().at("acceptance");
      EXPECT_EQ(a, line.at("method") == "draft" ? 0 : 1);
      if (line.at("method") != "triforce") {
        EXPECT_EQ(line.at("tokens_per_verification"), a == 1 ? 5 : 1);
      } else {
        EXPECT_NEAR(line.at("levels").at(1).at("acceptance").get<double>(), 0.5, 0.15);
      }
    }
  }
  e.trained("mod", "run", "--set model.max_seq_len=512");
  const auto lines = bench(
      "run --text text.jsonl --context 100 --tokens 40 --texts 2 --speculate "
      "retrieval,triforce,ngram --temperature 0.7" +
      small);
  ASSERT_EQ(lines.size(), 3U);
  for (const auto& line : lines) {
    EXPECT_EQ(line.at("kind"), "measured");
    EXPECT_EQ(line.at("tokens"), 80);
    EXPECT_EQ(line.at("draft"), line.at("method") == "triforce" ? "self-skip" : "");
    EXPECT_GT(line.at("speedup"), 0);
  }
  const auto no = [&](const std::string& arguments, int status, std::initializer_list<std::string> words) {
    expect_refusal(fathom_command(e, "bench speculative " + arguments), status, words);
  };
  no("--preset d2", 2, {"--acceptance R,D,B"});
  no("--preset d2 --acceptance 0.9 --speculate draft --context 64 --draft d2", 2, {"needs number 2"});
  no("run", 2, {"--text FILE"});
  no("run --text text.jsonl --acceptance 0.5", 2, {"it is measured"});
  no("run --text text.jsonl --context 500", 1, {"more than the model's context of 512"});
  no("run --text nowhere.txt", 1, {"nowhere.txt"});
}

TEST_F(SpeculativeCommands, SaysWhatCannotBe) {
  e.trained("mod", "run");
  e.trained("dense", "dense");
  testing::write_bytes(e / "prompts.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \"b\"}\n");
  refused("run -p x --speculate often", 2, {"--speculate"});
  refused("run -p x --draft ngram", 2, {"--draft goes with --speculate"});
  refused("run -p x --gamma 3", 2, {"--gamma goes with --speculate"});
  refused("run -p x --speculate ngram --gamma 40", 2, {"'40' is neither auto nor a number from 1 to 16"});
  refused("run -p x --speculate retrieval --draft ngram", 2, {"has no use for --draft"});
  refused("run --prompts prompts.jsonl --speculate ngram", 2, {"one prompt at a time", "2 were given"});
  refused("run -p x --speculate ngram --logprobs --json", 2, {"no log-probabilities"});
  refused("dense -p x --speculate draft", 2, {"no routed blocks", "--draft MODEL"});
  refused("dense -p x --speculate draft --draft self-skip", 1, {"no routed blocks"});
  refused("run -p x --speculate retrieval --retrieval-budget 100000", 1, {"100000", "leaves nothing out"});
  refused("run -p x --speculate retrieval --retrieval-budget 20", 1, {"less than four chunks of 8"});
  refused("run -p x --speculate draft --draft nowhere", 1, {"nowhere"});
  e.trained("mod", "short", "--set model.max_seq_len=16 --set train.seq_len=16");
  refused("run -p 'a longer text' -n 40 --speculate draft --draft short", 1,
          {"draft's context is 16 tokens"});
  // Another tokenizer.
  for (const char* command : {"tokenizer train text.jsonl --vocab 400 -o bpe.model",
                              "data prepare text.jsonl --tokenizer bpe.model --valid-fraction 0.1 -o bpe.h5"})
    ASSERT_EQ(fathom_command(e, command).status, 0) << command;
  e.trained("dense", "other",
            "--set data.train=bpe.h5 --set data.valid=bpe.valid.h5 --set data.tokenizer=bpe.model");
  refused("run -p x -n 4 --speculate draft --draft other", 1,
          {"The draft other has the tokenizer", "has bytes", "both need the same"});
  e.trained("mod", "topk", "--set routing.causal.method=none");
  refused("topk -p x --speculate triforce", 1, {"cannot be decoded"});
}

}  // namespace
}  // namespace fathom
