// Generation against a loop over causal_logits, dense and routed.
#include "infer/generate.h"

#include <algorithm>
#include <cmath>
#include <random>

#include <gtest/gtest.h>

#include "kernels/error.h"
#include "src/autograd/tape.h"

namespace fathom {
namespace {

using Ids = std::vector<std::int32_t>;
constexpr std::int64_t kVocab = 31;
constexpr std::int64_t kWindow = 12;

ModelConfig model_config() {
  ModelConfig m;
  m.vocab_size = kVocab;
  m.width = 16;
  m.depth = 4;
  m.heads = 4;
  m.kv_heads = 2;
  m.ffn_hidden = 20;
  m.max_seq_len = kWindow;
  return m;
}

RoutingConfig routed(CausalMethod method) {
  RoutingConfig r;
  r.kind = RoutingKind::Mod;
  r.capacity = 0.25;
  r.causal.method = method;
  r.causal.predictor_hidden = 5;
  return r;
}

RoutingConfig with_experts(RoutingConfig r, RoutingKind kind, ExpertsChoose choice) {
  r.kind = kind;
  r.experts = {.count = 3, .choice = choice};
  r.experts.noop = kind == RoutingKind::ModeIntegrated ? 2 : 0;
  return r;
}

struct Case {
  std::string name;
  RoutingConfig routing;
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }
};

class Generation : public ::testing::TestWithParam<Case> {
 protected:
  Generation()
      : c_(make_cpu_backend({}, 2), DType::F32), model_(c_, model_config(), GetParam().routing, false) {
    std::mt19937_64 generator(5);
    std::normal_distribution<double> normal;
    for (const ParameterSpec& spec : model_.parameters().specs()) {
      const bool norm = spec.name.find("norm") != std::string::npos;
      std::vector<double> values(static_cast<std::size_t>(spec.shape.size()));
      const double stddev = 1.5 / std::sqrt(static_cast<double>(spec.shape[-1]));
      for (double& x : values) x = norm ? 1.0 : stddev * normal(generator);
      from_doubles(c_.backend(), model_.parameters().get(spec.name), values);
    }
    options_.sampling.temperature = 0;
    options_.tokens = 8;
    if (is_routed()) options_.rule = causal_rule(GetParam().routing);
  }
  bool is_routed() const { return GetParam().routing.kind != RoutingKind::None; }

  /// Logits of the last of the ids' last kWindow tokens.
  std::vector<float> last_logits(const Ids& ids) {
    const auto length = std::min<std::size_t>(ids.size(), kWindow);
    const Ids window(ids.end() - static_cast<std::ptrdiff_t>(length), ids.end());
    const std::vector<float> all = causal_logits(c_, model_, window, options_.rule);
    EXPECT_EQ(all.size(), length * kVocab);
    return {all.end() - kVocab, all.end()};
  }
  static std::int32_t argmax(const std::vector<float>& logits) {
    return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  /// n tokens, greedily, a pass over the window for each.
  Ids by_hand(Ids ids, std::int64_t n) {
    const auto prompt = static_cast<std::ptrdiff_t>(ids.size());
    for (std::int64_t i = 0; i < n; ++i) ids.push_back(argmax(last_logits(ids)));
    return {ids.begin() + prompt, ids.end()};
  }

  Context c_;
  Transformer model_;
  GenerateOptions options_;
  const Ids prompt_ = {3, 14, 15, 9};
};

TEST_P(Generation, GreedyIsTheArgmaxOfCausalLogits) {
  const Generated got = generate(c_, model_, prompt_, options_);
  EXPECT_EQ(got.ids, by_hand(prompt_, 8));
  EXPECT_EQ(got.finish_reason, "length");
  ASSERT_EQ(got.logprobs.size(), 8U);
  Ids ids = prompt_;
  for (std::size_t i = 0; i < 8; ++i) {
    const std::vector<float> logits = last_logits(ids);
    double total = 0;
    for (float x : logits) total += std::exp(static_cast<double>(x));
    const double expected =
        static_cast<double>(logits[static_cast<std::size_t>(got.ids[i])]) - std::log(total);
    EXPECT_NEAR(got.logprobs[i], expected, 1e-5);
    ids.push_back(got.ids[i]);
  }
  EXPECT_EQ(got.routed_fraction.size(), GetParam().routing.routes_depth() ? 2U : 0U);
  EXPECT_EQ(got.expert_fraction.size(), GetParam().routing.has_experts() ? 4U : 0U);
  EXPECT_GT(got.prefill_seconds, 0);
  EXPECT_GT(got.decode_seconds, 0);
}

// A model that always says the same would pass without a model.
TEST_P(Generation, DependsOnThePrompt) {
  std::vector<Ids> texts;
  texts.reserve(5);
  for (std::int32_t first = 0; first < 5; ++first)
    texts.push_back(generate(c_, model_, {first, 7}, options_).ids);
  std::sort(texts.begin(), texts.end());
  EXPECT_GE(std::unique(texts.begin(), texts.end()) - texts.begin(), 3);
}

TEST_P(Generation, GoesOnFromTheLastTokensBeyondTheWindow) {
  options_.tokens = 3 * kWindow;
  EXPECT_EQ(generate(c_, model_, prompt_, options_).ids, by_hand(prompt_, 3 * kWindow));
  Ids prompt;
  for (std::int32_t i = 0; i < 2 * kWindow + 3; ++i)
    prompt.push_back(i * 7 % static_cast<std::int32_t>(kVocab));
  const Ids end(prompt.end() - kWindow, prompt.end());
  options_.tokens = 5;
  const Ids got = generate(c_, model_, prompt, options_).ids;
  EXPECT_EQ(got, by_hand(prompt, 5));
  EXPECT_EQ(got, generate(c_, model_, end, options_).ids);
}

TEST_P(Generation, StopsAtTheStopTokenAndLeavesItOut) {
  const Ids all = by_hand(prompt_, 8);
  const auto first = [&](std::int32_t id) { return std::find(all.begin(), all.end(), id) - all.begin(); };
  options_.stop_tokens = {all[4]};
  const Generated got = generate(c_, model_, prompt_, options_);
  EXPECT_EQ(got.ids, Ids(all.begin(), all.begin() + first(all[4])));
  EXPECT_EQ(got.logprobs.size(), got.ids.size());
  EXPECT_EQ(got.finish_reason, "stop");
  // In the prompt it stops nothing.
  options_.stop_tokens.clear();
  for (std::int32_t id : prompt_) {
    if (first(id) < 8) continue;
    options_.stop_tokens = {id};
    EXPECT_EQ(generate(c_, model_, prompt_, options_).ids, all);
  }
}

TEST_P(Generation, ShowsEachTokenAndStopsWhenAsked) {
  Ids shown;
  const Generated got = generate(c_, model_, prompt_, options_, [&](std::int32_t id) {
    shown.push_back(id);
    return shown.size() < 3;
  });
  EXPECT_EQ(shown.size(), 3U);
  EXPECT_EQ(got.ids, shown);
  EXPECT_EQ(got.finish_reason, "stop");
}

TEST_P(Generation, NoTokensAskedForIsNoToken) {
  options_.tokens = 0;
  const Generated got = generate(c_, model_, prompt_, options_);
  EXPECT_TRUE(got.ids.empty());
  EXPECT_EQ(got.finish_reason, "length");
}

// Each draw is a function of the seed and the place in the text, so a text can be taken up where it ended.
TEST_P(Generation, ContinuesASampledTextAsIfNeverStopped) {
  options_.sampling = {.temperature = 1.0, .top_p = 0.95, .seed = 11};
  const Ids whole = generate(c_, model_, prompt_, options_).ids;
  EXPECT_EQ(generate(c_, model_, prompt_, options_).ids, whole);
  Ids half = prompt_;
  half.insert(half.end(), whole.begin(), whole.begin() + 4);
  options_.tokens = 4;
  EXPECT_EQ(generate(c_, model_, half, options_).ids, Ids(whole.begin() + 4, whole.end()));
  options_.tokens = 8;
  options_.sampling.seed = 12;
  EXPECT_NE(generate(c_, model_, prompt_, options_).ids, whole);
}

TEST_P(Generation, RecordsNothingOnATape) {
  Tape tape(c_);
  c_.set_tape(&tape);
  generate(c_, model_, prompt_, options_);
  causal_logits(c_, model_, prompt_, options_.rule);
  c_.set_tape(nullptr);
  EXPECT_EQ(tape.size(), 0U);
}

TEST_P(Generation, RefusesPromptsThatItCannotRead) {
  const auto message = [&](const Ids& prompt) {
    std::string text;
    for (int way = 0; way < 2; ++way) {
      try {
        way == 0 ? void(generate(c_, model_, prompt, options_))
                 : void(causal_logits(c_, model_, prompt, options_.rule));
        ADD_FAILURE() << "no error";
      } catch (const UserError& e) {
        EXPECT_TRUE(text.empty() || text == e.what());
        text = e.what();
      }
    }
    return text;
  };
  const auto expect_words = [&](const Ids& prompt, std::initializer_list<const char*> words) {
    const std::string text = message(prompt);
    for (const char* word : words) EXPECT_NE(text.find(word), std::string::npos) << text << " lacks " << word;
  };
  expect_words({}, {"prompt is empty", "-p", "--prompt-ids"});
  expect_words({1, 2, 31}, {"Token 2", "31", "vocabulary", "tokenizer"});
  expect_words({-1}, {"Token 0", "-1", "vocabulary of 31"});
  message({1, 1000000});
}

INSTANTIATE_TEST_SUITE_P(
    Models, Generation,
    ::testing::Values(
        Case{"dense", {}}, Case{"mod_aux", routed(CausalMethod::Aux)},
        Case{"mod_predictor", routed(CausalMethod::Predictor)},
        Case{"moe_aux", with_experts(routed(CausalMethod::Aux), RoutingKind::Moe, ExpertsChoose::Expert)},
        Case{"mode_staged_predictor",
             with_experts(routed(CausalMethod::Predictor), RoutingKind::ModeStaged, ExpertsChoose::Expert)},
        Case{"mode_integrated_tokens",
             with_experts(routed(CausalMethod::None), RoutingKind::ModeIntegrated, ExpertsChoose::Token)}),
    [](const auto& p) { return p.param.name; });

// The threshold is a dial at run time.
TEST(GenerationThreshold, TurnsHowManyTokensAreRouted) {
  Context c(make_cpu_backend({}, 1), DType::F32);
  Transformer model(c, model_config(), routed(CausalMethod::Aux), false);
  model.initialise(c, 3);
  const auto fraction = [&](double threshold) {
    GenerateOptions options;
    options.tokens = 1;
    options.rule.threshold = threshold;
    return generate(c, model, {1, 2, 3, 4, 5, 6, 7, 8}, options).routed_fraction;
  };
  EXPECT_EQ(fraction(1e-6), (std::vector<double>{1, 1}));
  EXPECT_EQ(fraction(1 - 1e-6), (std::vector<double>{0, 0}));
}

}  // namespace
}  // namespace fathom
