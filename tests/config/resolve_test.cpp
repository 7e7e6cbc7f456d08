// Defaults that depend on other keys, printing that reads back, and the comparison of two configurations.
#include "src/config/resolve.h"

#include <cmath>
#include <fstream>
#include <random>
#include <sstream>

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "src/config/keys.h"
#include "src/config/parse.h"
#include "src/config/print.h"

namespace fathom {
namespace {

using ::testing::HasSubstr;

Config base() {
  Config c;
  c.train.steps = 10;
  return c;
}

TEST(Resolve, FillsWhatFollowsFromOtherKeys) {
  Config c = base();
  c.model.width = 384;
  c.model.heads = 6;
  c.train.seq_len = 128;
  c.train.batch_tokens = 1024;
  const Config r = resolve(c, 4097);
  EXPECT_EQ(r.model.vocab_size, 4160);
  EXPECT_EQ(r.model.kv_heads, 6);
  EXPECT_EQ(r.model.ffn_hidden, 1024);
  EXPECT_EQ(r.model.max_seq_len, 128);
  EXPECT_EQ(r.routing.causal.predictor_hidden, 96);
  EXPECT_EQ(r.train.micro_batch, 8);
  EXPECT_EQ(resolve(r), r);
  EXPECT_EQ(resolve(base()).model.ffn_hidden, 704);
  EXPECT_EQ(resolve(base()).model.vocab_size, 0);
}

// One model, one config: a head's size that is the width's share says nothing.
TEST(Resolve, AHeadsSizeStandsWhereItIsAnother) {
  Config c = base();
  c.model.width = 384;
  c.model.heads = 6;
  EXPECT_EQ(resolve(c).model.head_dim(), 64);
  c.model.own_head_dim = 64;
  EXPECT_EQ(resolve(c).model.own_head_dim, 0);
  c.model.own_head_dim = 128;
  EXPECT_EQ(resolve(c).model.head_dim(), 128);
  c.model.heads = 5;  // which does not divide the width
  c.model.kv_heads = 5;
  EXPECT_EQ(resolve(c).model.head_dim(), 128);
}

TEST(Resolve, WhereExpertsChooseAPredictorForetells) {
  const auto method = [](RoutingKind kind, ExpertsChoose choice, CausalMethod given = CausalMethod::Auto) {
    Config c = base();
    c.routing.kind = kind;
    c.routing.experts.choice = choice;
    c.routing.causal.method = given;
    return resolve(c).routing.causal.method;
  };
  using enum RoutingKind;
  for (const RoutingKind kind : {Moe, ModeStaged, ModeIntegrated}) {
    EXPECT_EQ(method(kind, ExpertsChoose::Expert), CausalMethod::Predictor);
    EXPECT_EQ(method(kind, ExpertsChoose::Token), CausalMethod::Aux);
    EXPECT_EQ(method(kind, ExpertsChoose::Expert, CausalMethod::Aux), CausalMethod::Aux);
  }
  EXPECT_EQ(method(Mod, ExpertsChoose::Expert), CausalMethod::Aux);
  EXPECT_EQ(method(Mod, ExpertsChoose::Expert, CausalMethod::None), CausalMethod::None);
}

TEST(Resolve, KeepsWhatIsGiven) {
  Config c = base();
  c.model.vocab_size = 5000;
  c.model.kv_heads = 2;
  c.model.ffn_hidden = 100;
  const Config r = resolve(c, 4096);
  EXPECT_EQ(r.model.vocab_size, 5000);
  EXPECT_EQ(r.model.kv_heads, 2);
  EXPECT_EQ(r.model.ffn_hidden, 100);
}

TEST(Resolve, RefusesAVocabularySmallerThanTheStores) {
  Config c = base();
  c.model.vocab_size = 256;
  try {
    resolve(c, 4096);
    FAIL();
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), HasSubstr("model.vocab_size is 256"));
    EXPECT_THAT(e.what(), HasSubstr("4096"));
  }
}

TEST(Print, AConfigReadsBackToItself) {
  EXPECT_EQ(parse_config(to_yaml(base()), "printed", {}), base());
  const Config r = resolve(base(), 4096);
  EXPECT_EQ(parse_config(to_yaml(r), "printed", {}), r);
}

// Any value that a key accepts, as YAML text.
std::string random_value(const Key& key, std::mt19937_64& random) {
  const auto below = [&](std::uint64_t n) { return random() % n; };
  if (!key.choices.empty()) return key.choices[below(key.choices.size())];
  if (key.optional && below(2) == 0) return "null";
  if (key.type == "true or false") return below(2) ? "true" : "false";
  if (key.type == "text") {
    static const std::vector<std::string> pieces = {"a",  "/b", " ", "#",    ": ",   "\"",   "'", "\\",
                                                    "\n", "\t", "-", "é",    "...",  "null", "[", "&",
                                                    "*",  "!",  "%", "\x7f", "\x01", "1e5",  "{}"};
    std::string text;
    for (std::uint64_t n = below(6); n > 0; --n) text += pieces[below(pieces.size())];
    return text;
  }
  const double low = std::max(key.range.min, 0.0);
  const double high = std::min(key.range.max, 1e15);
  const double unit = std::uniform_real_distribution<double>(1e-9, 0.999)(random);
  const double x = low + std::pow(unit, 1 + static_cast<double>(below(12))) * (high - low);
  if (key.type == "a whole number") return fmt::format("{}", static_cast<std::int64_t>(x));
  if (key.type == "a list of two numbers") return fmt::format("[{}, {}]", unit, 1 - unit);
  return fmt::format("{}", x);
}

TEST(Print, RandomConfigsReadBackToThemselves) {
  std::mt19937_64 random(7);
  for (int i = 0; i < 500; ++i) {
    Config c;
    for (const Key& key : config_keys()) {
      Entry entry{.path = std::string(key.path),
                  .form = Entry::Form::Plain,
                  .text = random_value(key, random),
                  .items = {},
                  .where = ""};
      if (key.optional && entry.text == "null") entry.form = Entry::Form::Null;
      if (key.type == "a list of two numbers") entry = read_override(entry.path + "=" + entry.text);
      key.read(c, key, entry);  // a value that rounding put outside the range keeps the default
    }
    const std::string yaml = to_yaml(c);
    Config back;
    for (const Entry& entry : read_document(yaml, "printed")) {
      const Key* key = find_key(entry.path);
      if (key == nullptr) continue;
      ASSERT_TRUE(key->read(back, *key, entry)) << entry.path << "\n" << yaml;
    }
    ASSERT_EQ(back, c) << difference(back, c) << yaml;
    ASSERT_EQ(difference(back, c), "");
  }
}

TEST(Print, NumbersAreShortest) {
  Config c = base();
  c.train.lr = 0.1;
  c.train.target_flops = 2e13;
  EXPECT_THAT(to_yaml(c), HasSubstr("  lr: 0.1\n"));
  EXPECT_THAT(to_yaml(c), HasSubstr("  target_flops: 2e+13\n"));
  EXPECT_THAT(to_yaml(c), HasSubstr("  causal:\n    method: auto\n"));
}

TEST(Difference, NamesEachKeyAndBothValues) {
  Config a = base(), b = base();
  EXPECT_EQ(difference(a, b), "");
  a.model.depth = 4;
  a.routing.kind = RoutingKind::Mod;
  b.train.steps.reset();
  EXPECT_EQ(
      difference(a, b),
      "model.depth: 4 here, 6 there\nrouting.kind: mod here, none there\ntrain.steps: 10 here, null there\n");
}

TEST(Keys, EveryKeyIsExplainedAndItsDefaultIsInRange) {
  const Config defaults;
  for (const Key& key : config_keys()) {
    EXPECT_FALSE(key.help.empty()) << key.path;
    EXPECT_EQ(find_key(key.path), &key);
    Config c;
    const Entry entry = read_override(std::string(key.path) + "=" + key.print(defaults));
    EXPECT_TRUE(key.read(c, key, entry)) << key.path << " " << key.print(defaults);
  }
  EXPECT_TRUE(is_section("routing"));
  EXPECT_TRUE(is_section("routing.causal"));
  EXPECT_FALSE(is_section("routing.caus"));
  EXPECT_FALSE(is_section("model.depth"));
}

// docs/config.md holds the table of the keys as the program knows it. `fathom plan --keys` prints it.
TEST(Keys, TheDocumentationHoldsTheTable) {
  std::ifstream file(FATHOM_SOURCE_DIR "/docs/config.md");
  ASSERT_TRUE(file);
  std::stringstream text;
  text << file.rdbuf();
  EXPECT_THAT(text.str(), HasSubstr(config_reference()))
      << "put the output of `fathom plan --keys` into docs/config.md";
}

}  // namespace
}  // namespace fathom
