// What the config reader accepts, and what it says about what it does not.
#include "src/config/parse.h"

#include <fstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "src/config/keys.h"
#include "src/config/suggest.h"

namespace fathom {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

Config parse(const std::string& yaml, const std::vector<std::string>& overrides = {}) {
  return parse_config(yaml, "a.yaml", overrides);
}

// The message of the UsageError that reading `yaml` throws.
std::string error_of(const std::string& yaml, const std::vector<std::string>& overrides = {}) {
  try {
    parse(yaml, overrides);
  } catch (const UsageError& e) {
    return e.what();
  }
  ADD_FAILURE() << "accepted:\n" << yaml;
  return "";
}

const std::string kBase = "train:\n  steps: 10\n";

TEST(Parse, DefaultsAndEveryKindOfValue) {
  const Config c = parse(R"(# a comment
seed: 18446744073709551615
deterministic: true
model: {width: 384, heads: 6, rope_theta: 5e5, rope_scaling: {kind: llama3, factor: 32}}
routing:
  kind: mod
  gate: "sigmoid"
  causal:
    method: both
data:
  train: "a b.h5"
train:
  betas: [0.9, 0.99]
  tokens: 1e9
  batch_tokens: 2.048e3
)");
  EXPECT_EQ(c.seed, 18446744073709551615u);
  EXPECT_TRUE(c.deterministic);
  EXPECT_EQ(c.model.width, 384);
  EXPECT_EQ(c.model.depth, ModelConfig{}.depth);
  EXPECT_EQ(c.model.rope_theta, 5e5);
  EXPECT_EQ(c.model.rope_scaling, (RopeScaling{RopeScalingKind::Llama3, 32.0, 1.0, 4.0, 8192}));
  EXPECT_EQ(c.routing.kind, RoutingKind::Mod);
  EXPECT_EQ(c.routing.gate, Gate::Sigmoid);
  EXPECT_EQ(c.routing.causal.method, CausalMethod::Both);
  EXPECT_EQ(c.data.train, "a b.h5");
  EXPECT_EQ(c.train.betas, (std::vector<double>{0.9, 0.99}));
  EXPECT_EQ(c.train.tokens, 1000000000);
  EXPECT_EQ(c.train.batch_tokens, 2048);
  EXPECT_FALSE(c.train.steps.has_value());
}

TEST(Parse, OverridesComeLastAndInOrder) {
  const Config c =
      parse(kBase + "model:\n  depth: 4\n",
            {"model.depth=8", "model.depth=12", "train.betas=[0.8, 0.9]", "data.train=C: b #1.h5",
             "data.valid='x y'", "train.steps=null", "train.tokens=4096"});
  EXPECT_EQ(c.model.depth, 12);
  EXPECT_EQ(c.train.betas, (std::vector<double>{0.8, 0.9}));
  EXPECT_EQ(c.data.train, "C: b #1.h5");
  EXPECT_EQ(c.data.valid, "x y");
  EXPECT_EQ(c.train.tokens, 4096);
}

TEST(Parse, EmptySectionsKeepTheirDefaults) {
  EXPECT_EQ(parse(kBase + "model:\nrouting: {}\n"), parse(kBase));
}

TEST(Parse, UnknownKeysNameTheLineAndTheKeyThatWasMeant) {
  EXPECT_THAT(error_of(kBase + "model:\n  dpeth: 4\n"),
              AllOf(HasSubstr("a.yaml:4"), HasSubstr("model.dpeth"), HasSubstr("Did you mean model.depth?")));
  EXPECT_THAT(error_of(kBase + "modle:\n  depth: 4\n"),
              AllOf(HasSubstr("modle"), HasSubstr("Did you mean model?")));
  EXPECT_THAT(error_of(kBase + "modle: {}\n"), HasSubstr("Did you mean model?"));
  EXPECT_THAT(error_of(kBase + "depth: 4\n"), HasSubstr("Did you mean model.depth?"));
  EXPECT_THAT(error_of(kBase + "routing:\n  treshold: 0.4\n"),
              HasSubstr("Did you mean routing.causal.threshold?"));
  EXPECT_THAT(error_of(kBase, {"model.widht=4"}),
              AllOf(HasSubstr("--set model.widht=4"), HasSubstr("model.width")));
  EXPECT_THAT(error_of(kBase + "model:\n  xyzzy_plugh: 4\n"),
              HasSubstr("The section model has vocab_size, width"));
  EXPECT_THAT(error_of(kBase + "experts:\n  cuont: 8\n"), HasSubstr("Did you mean experts.count?"));
}

TEST(Parse, EditDistanceCountsASwapOnce) {
  EXPECT_EQ(edit_distance("depth", "depth"), 0);
  EXPECT_EQ(edit_distance("dpeth", "depth"), 1);
  EXPECT_EQ(edit_distance("", "abc"), 3);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3);
}

TEST(Parse, WrongTypesSayWhatWasExpected) {
  const auto of = [](const std::string& section, const std::string& line) {
    return error_of(kBase + (section.empty() ? "" : section + ":\n  ") + line + "\n");
  };
  EXPECT_THAT(of("model", "depth: six"), AllOf(HasSubstr("a.yaml:4"), HasSubstr("model.depth is six"),
                                               HasSubstr("a whole number from 1 to 4096")));
  EXPECT_THAT(of("model", "depth: 6.5"), HasSubstr("a whole number"));
  EXPECT_THAT(of("model", "depth: \"6\""), HasSubstr("model.depth is \"6\""));
  EXPECT_THAT(of("model", "depth: [6]"), HasSubstr("model.depth is [6]"));
  EXPECT_THAT(of("model", "depth: {a: 6}"), HasSubstr("model.depth is a section"));
  EXPECT_THAT(of("model", "depth:"), HasSubstr("model.depth is empty"));
  EXPECT_THAT(of("model", "depth: 0x10"), HasSubstr("model.depth is 0x10"));
  EXPECT_THAT(of("model", "qk_norm: yes"), HasSubstr("true or false"));
  EXPECT_THAT(of("data", "train: [a]"), HasSubstr("text"));
  EXPECT_THAT(of("routing", "kind: mode"), HasSubstr("one of none, mod, moe, mode_staged, mode_integrated"));
  EXPECT_THAT(of("experts", "choice: tokens"), HasSubstr("one of expert, token"));
  EXPECT_THAT(of("experts", "top_k: 0"), HasSubstr("a token goes somewhere"));
  EXPECT_THAT(of("experts", "balance_weight: -0.1"), HasSubstr("a weight is not negative"));
  EXPECT_THAT(of("experts", "count: 0"), AllOf(HasSubstr("experts.count is 0"), HasSubstr("from 1 to 1024")));
  EXPECT_THAT(of("experts", "capacity_factor: -1"), HasSubstr("a number from 0 to 1024"));
  EXPECT_THAT(of("experts", "capacity_factor: .inf"), HasSubstr("experts.capacity_factor is .inf"));
  EXPECT_THAT(of("experts", "noop: -1"), HasSubstr("experts.noop is -1"));
  EXPECT_THAT(of("experts", "counts: 4"), HasSubstr("experts.count"));
  EXPECT_THAT(of("routing", "causal: aux"), AllOf(HasSubstr("routing.causal is aux"), HasSubstr("section")));
  EXPECT_THAT(of("", "model: 7"), AllOf(HasSubstr("model is 7"), HasSubstr("section")));
  EXPECT_THAT(of("", "seed: -1"), HasSubstr("seed is -1"));
  EXPECT_THAT(of("model", "norm_eps: .nan"), HasSubstr("model.norm_eps is .nan"));
  EXPECT_THAT(of("model", "norm_eps: nan"), HasSubstr("model.norm_eps is nan"));
  EXPECT_THAT(of("model", "norm_eps: inf"), HasSubstr("model.norm_eps is inf"));
  EXPECT_THAT(error_of("train:\n  steps: 1\n  betas: [0.9]\n"), HasSubstr("a list of two numbers"));
  EXPECT_THAT(error_of("train:\n  steps: 1\n  betas: 0.9\n"), HasSubstr("a list of two numbers"));
  EXPECT_THAT(error_of("train:\n  steps: 1\n  precision: fp16\n"), HasSubstr("one of fp32, bf16"));
}

TEST(Parse, NumbersOutOfRangeSayWhy) {
  const auto of = [](const std::string& override_text) { return error_of(kBase, {override_text}); };
  EXPECT_THAT(of("model.depth=-3"), AllOf(HasSubstr("model.depth is -3"), HasSubstr("at least one block")));
  EXPECT_THAT(of("model.depth=1e18"), HasSubstr("model.depth is 1e18"));
  EXPECT_THAT(of("model.depth=99999999999999999999999"), HasSubstr("from 1 to 4096"));
  EXPECT_THAT(of("train.tokens=1e18"), HasSubstr("train.tokens is 1e18"));
  EXPECT_THAT(of("train.lr=1e999"), HasSubstr("train.lr is 1e999"));
  EXPECT_THAT(of("train.lr=0"), HasSubstr("above 0 and at most 100"));
  EXPECT_THAT(of("routing.capacity=0"),
              AllOf(HasSubstr("above 0 and at most 1"), HasSubstr("share of the tokens")));
  EXPECT_THAT(of("routing.capacity=1.5"), HasSubstr("above 0 and at most 1"));
  EXPECT_THAT(of("routing.causal.threshold=1"), HasSubstr("above 0 and below 1"));
  EXPECT_THAT(of("train.betas=[0.9, 1]"), HasSubstr("of at least 0 and below 1"));
  EXPECT_THAT(of("train.keep_checkpoints=0"), HasSubstr("train.keep_checkpoints is 0"));
}

TEST(Parse, BrokenYamlNamesTheLine) {
  EXPECT_THAT(error_of("train:\n  steps: [1\n"), AllOf(HasSubstr("a.yaml:2"), HasSubstr("closing bracket")));
  EXPECT_THAT(error_of("data:\n  train: \"a.h5\n"), AllOf(HasSubstr("a.yaml:"), HasSubstr("not valid YAML")));
  EXPECT_THAT(error_of("train:\n\tsteps: 1\n"), HasSubstr("a.yaml:2"));
  EXPECT_THAT(error_of("- 1\n- 2\n"), HasSubstr("expected sections"));
  EXPECT_THAT(error_of("just words\n"), HasSubstr("expected sections"));
  EXPECT_THAT(error_of(kBase + "---\nseed: 2\n"), HasSubstr("second YAML document"));
  EXPECT_THAT(error_of(kBase + "train:\n  lr: 1\n"),
              AllOf(HasSubstr("a.yaml:3"), HasSubstr("second time"), HasSubstr("line 1")));
  EXPECT_THAT(error_of("train:\n  steps: 1\n  steps: 2\n"),
              AllOf(HasSubstr("train.steps"), HasSubstr("line 2")));
  EXPECT_THAT(error_of("train: &t\n  steps: 1\n"), HasSubstr("anchors"));
  EXPECT_THAT(error_of("a: &x 1\nb: *x\n"), HasSubstr("anchors"));
  EXPECT_THAT(error_of("train:\n  steps: !!int 1\n"), HasSubstr("tags"));
  EXPECT_THAT(error_of("train:\n  ? [a, b]\n  : 1\n"), HasSubstr("where a key is expected"));
}

TEST(Parse, ForeignBytesAreRefused) {
  EXPECT_THAT(error_of("train:\n  steps: 1 # caf\xe9\n"),
              AllOf(HasSubstr("a.yaml:2"), HasSubstr("0xe9"), HasSubstr("UTF-8")));
  EXPECT_THAT(error_of(std::string("train:\n\0", 8)), HasSubstr("NUL"));
  EXPECT_THAT(error_of(std::string("\xff\xfet\0", 4)), HasSubstr("UTF-8"));
  EXPECT_THAT(error_of(std::string((1 << 20) + 1, '#')), HasSubstr("1 MiB"));
  EXPECT_NO_THROW(parse("\xef\xbb\xbf" + kBase + "data:\n  train: caf\xc3\xa9.h5\n"));
}

TEST(Parse, DeepNestingIsCutOff) {
  for (const char* open : {"[", "{", "{a: ", "- ", "? ", "a: [", "[{"}) {
    std::string bomb;
    while (bomb.size() < (std::size_t{1} << 19)) bomb += open;
    error_of(bomb);
    error_of("train: " + bomb);
    error_of("train:\n  betas: " + bomb);
  }
  std::string stairs;
  for (int i = 0; i < 1000; ++i) stairs += std::string(static_cast<std::size_t>(i), ' ') + "a:\n";
  EXPECT_THAT(error_of(stairs), HasSubstr("nested deeper"));
}

TEST(Parse, ContradictionsNameBothKeys) {
  const auto of = [](const std::vector<std::string>& overrides) { return error_of(kBase, overrides); };
  EXPECT_THAT(of({"model.rope_scaling.kind=llama3", "model.rope_scaling.low_freq_factor=4"}),
              AllOf(HasSubstr("--set model.rope_scaling.low_freq_factor=4"),
                    HasSubstr("high_freq_factor is 4, not above"), HasSubstr("Llama 3 has 1 and 4")));
  EXPECT_THAT(of({"model.width=100", "model.heads=3"}),
              AllOf(HasSubstr("--set model.width=100"), HasSubstr("model.heads is 3"), HasSubstr("divide"),
                    HasSubstr("99 and 102")));
  EXPECT_THAT(of({"model.width=12", "model.heads=4"}), HasSubstr("must be even"));
  EXPECT_THAT(of({"model.head_dim=7"}), AllOf(HasSubstr("model.head_dim is 7"), HasSubstr("must be even")));
  EXPECT_THAT(of({"model.width=100", "model.heads=3", "model.head_dim=-2"}), HasSubstr("model.head_dim"));
  EXPECT_THAT(of({"model.heads=4", "model.kv_heads=3"}), HasSubstr("model.kv_heads is 3"));
  EXPECT_THAT(of({"train.seq_len=512", "train.batch_tokens=1000"}), HasSubstr("multiple of train.seq_len"));
  EXPECT_THAT(of({"train.batch_tokens=128"}), HasSubstr("multiple of train.seq_len"));
  EXPECT_THAT(of({"train.micro_batch=3"}), HasSubstr("divide the 8 sequences"));
  EXPECT_THAT(of({"model.max_seq_len=128"}), HasSubstr("model.max_seq_len"));
  EXPECT_THAT(of({"routing.kind=mod", "routing.first=6"}), HasSubstr("no block would be routed"));
  EXPECT_THAT(of({"routing.kind=mode_staged", "routing.first=6"}), HasSubstr("no block would be routed"));
  EXPECT_NO_THROW(parse(kBase, {"routing.kind=moe", "routing.first=6"}));  // no block is routed by depth
  EXPECT_THAT(of({"routing.kind=moe", "experts.count=4", "experts.capacity_factor=4.5"}),
              AllOf(HasSubstr("--set experts.capacity_factor=4.5"), HasSubstr("all tokens from 4 on"),
                    HasSubstr("at most 4")));
  EXPECT_THAT(of({"routing.kind=mode_integrated"}),
              AllOf(HasSubstr("experts.noop is 0"), HasSubstr("experts.count = 8"), HasSubstr("to moe")));
  EXPECT_THAT(of({"routing.kind=moe", "experts.noop=2"}),
              AllOf(HasSubstr("experts.noop is 2"), HasSubstr("routing.kind is moe")));
  EXPECT_THAT(of({"routing.kind=mode_staged", "experts.noop=2"}), HasSubstr("routing.kind is mode_staged"));
  EXPECT_THAT(of({"routing.kind=moe", "experts.capacity_factor=0"}), HasSubstr("need a number of tokens"));
  EXPECT_NO_THROW(parse(kBase, {"routing.kind=moe", "experts.choice=token", "experts.capacity_factor=0"}));
  EXPECT_THAT(of({"routing.kind=moe", "experts.choice=token", "experts.capacity_factor=4.5"}),
              AllOf(HasSubstr("all tokens from 4 on"), HasSubstr("at most 4")));
  EXPECT_THAT(of({"routing.kind=moe", "experts.choice=token", "experts.count=2", "experts.top_k=3"}),
              AllOf(HasSubstr("experts.top_k is 3"), HasSubstr("experts.count = 2")));
  EXPECT_NO_THROW(parse(kBase, {"experts.noop=2"}));  // a dense model has no experts
  EXPECT_THAT(of({"train.schedule=wsd", "train.warmup=0.9"}), HasSubstr("more than all of them"));
  EXPECT_THAT(of({"device=gpu"}), HasSubstr("cpu, cuda, cuda:N or auto"));
  EXPECT_THAT(of({"device=cuda:x"}), HasSubstr("cuda:N"));
  EXPECT_THAT(of({"data.valid=v.h5", "train.eval_tokens=10"}), HasSubstr("train.eval_tokens"));
  EXPECT_NO_THROW(parse(kBase, {"device=cuda:1"}));
}

TEST(Parse, ExactlyOneHorizon) {
  EXPECT_THAT(error_of("seed: 1\n"),
              AllOf(HasSubstr("a.yaml: the config has no horizon"), HasSubstr("train.target_flops")));
  EXPECT_THAT(error_of(""), HasSubstr("no horizon"));
  EXPECT_THAT(error_of(kBase, {"train.tokens=5000"}),
              AllOf(HasSubstr("a.yaml:2"), HasSubstr("train.tokens = 5000"), HasSubstr("train.steps = 10")));
  EXPECT_THAT(error_of("train: {steps: 1, tokens: 2, target_flops: 3}"), HasSubstr("3 horizons"));
}

TEST(Parse, OverridesNeedAnEqualsSign) {
  EXPECT_THAT(error_of(kBase, {"model.depth"}), HasSubstr("KEY=VALUE"));
  EXPECT_THAT(error_of(kBase, {"=3"}), HasSubstr("KEY=VALUE"));
  EXPECT_THAT(error_of(kBase, {"train.betas=[0.9"}), HasSubstr("--set train.betas=[0.9"));
}

TEST(Parse, FilesThatCannotBeRead) {
  const std::string folder = ::testing::TempDir();
  EXPECT_THROW(load_config(folder), UsageError);
  EXPECT_THROW(load_config(folder + "/no_such_config.yaml"), UsageError);
  const std::string path = folder + "/good_config.yaml";
  std::ofstream(path) << kBase;
  EXPECT_EQ(load_config(path).train.steps, 10);
}

TEST(Parse, NotesWhatCannotBeServed) {
  EXPECT_TRUE(config_notes(parse(kBase)).empty());
  const auto notes = config_notes(parse(kBase, {"routing.kind=mod", "routing.causal.method=none"}));
  ASSERT_EQ(notes.size(), 1u);
  EXPECT_THAT(notes[0], HasSubstr("cannot generate or be served"));
  const auto experts = config_notes(parse(kBase, {"routing.kind=moe", "routing.causal.method=none"}));
  ASSERT_EQ(experts.size(), 1u);
  EXPECT_THAT(experts[0], HasSubstr("cannot generate or be served"));
  EXPECT_TRUE(config_notes(parse(kBase, {"routing.kind=moe"})).empty());
  const auto aux = config_notes(parse(kBase, {"routing.kind=moe", "routing.causal.method=aux"}));
  ASSERT_EQ(aux.size(), 1u);
  EXPECT_THAT(aux[0], HasSubstr("predictor"));
  EXPECT_TRUE(
      config_notes(parse(kBase, {"routing.kind=moe", "routing.causal.method=none", "experts.choice=token"}))
          .empty());
}

}  // namespace
}  // namespace fathom
