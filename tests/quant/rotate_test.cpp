// A rotated model computes what it was: logits, and every routing decision, in double.
#include "infer/quant/rotate.h"

#include <algorithm>
#include <cmath>
#include <random>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "infer/quant/outliers.h"
#include "infer/quant/quantize_model.h"
#include "tests/quant/model_kinds.h"
#include "tests/quant/round_to_nearest.h"

namespace fathom::model_test {
namespace {

struct Case {
  std::string name;
  ModelConfig model;
  RoutingConfig routing;
  SelectionRule rule;
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }
};

ModelConfig of(std::int64_t width, std::int64_t heads, std::int64_t kv_heads, bool qk_norm, bool tied,
               std::int64_t head_dim = 0) {
  ModelConfig m = small_config();
  m.width = width, m.heads = heads, m.kv_heads = kv_heads;
  m.qk_norm = qk_norm, m.tie_embeddings = tied;
  m.own_head_dim = head_dim;
  return m;
}

std::vector<Case> cases() {
  const ModelConfig plain = of(16, 4, 4, false, false);
  const Causal by_router{Causal::Logit::Router, 0.5}, by_predictor{Causal::Logit::Predictor, 0.5};
  return {{"dense", plain, by(CausalMethod::None), TopK{}},
          {"dense_tied_grouped", of(24, 4, 2, true, true), by(CausalMethod::None), TopK{}},
          {"dense_wide_heads", of(20, 3, 1, true, true, 12), by(CausalMethod::None), TopK{}},
          {"dense_in_blocks", of(18, 3, 3, false, false), by(CausalMethod::None), TopK{}},
          {"mod_by_router", plain, routed(CausalMethod::Both, Gate::Sigmoid, 0.5), by_router},
          {"mod_by_predictor", of(24, 4, 2, true, true), routed(CausalMethod::Both), by_predictor},
          {"mod_top_k", plain, routed(CausalMethod::None, Gate::Tanh), TopK{}},
          {"moe", plain, with_experts(by(CausalMethod::Predictor), RoutingKind::Moe), by_predictor},
          {"moe_top_k", plain, with_experts(by(CausalMethod::Predictor), RoutingKind::Moe), TopK{}},
          {"moe_by_token", plain, tokens_choose(by(CausalMethod::None), RoutingKind::Moe, 2, 1.25), TopK{}},
          {"mode_staged", plain, with_experts(routed(CausalMethod::Predictor), RoutingKind::ModeStaged),
           by_predictor},
          {"mode_integrated", of(24, 2, 1, false, true),
           with_experts(by(CausalMethod::Both), RoutingKind::ModeIntegrated), by_router}};
}

struct Pass {
  std::vector<double> logits;
  std::vector<std::vector<std::int32_t>> chosen;
};

Pass pass_of(Context& c, const Transformer& model, const Batch& batch, const SelectionRule& rule) {
  const NoGrad no_grad(c);
  const ForwardResult result = model.forward(c, batch, rule);
  Pass pass{to_doubles(c.backend(), model.logits(c, result.hidden)), {}};
  for (const RoutedLayer& r : result.routing)
    pass.chosen.push_back(to_host<std::int32_t>(c.backend(), r.indices));
  for (const ExpertLayer& e : result.experts)
    pass.chosen.push_back(to_host<std::int32_t>(c.backend(), e.dispatch.rows));
  return pass;
}

constexpr OnlineHadamards kAllOnline{.down = true, .heads = true, .queries_keys = true};

class Rotation : public ::testing::TestWithParam<std::tuple<Case, bool>> {};

TEST_P(Rotation, ChangesNoLogitAndNoDecision) {
  const auto& [k, online] = GetParam();
  SmallModel m(DType::F64, k.model, k.routing);
  const Batch batch = m.random_batch(3, 24, 5);
  const Pass before = pass_of(m.context, m.model, batch, k.rule);
  const auto rotated =
      rotate_model(m.context, m.model, {.seed = 9, .online = online ? kAllOnline : OnlineHadamards{}});
  EXPECT_EQ(rotated->quantization() != nullptr, online);
  EXPECT_FALSE(rotated->config().tie_embeddings);
  const Pass after = pass_of(m.context, *rotated, batch, k.rule);
  EXPECT_EQ(after.chosen, before.chosen);
  ASSERT_EQ(after.logits.size(), before.logits.size());
  EXPECT_LT(relative_difference(after.logits, before.logits), 1e-11);
  // It is another model all the same, with norms of one.
  for (const ParameterSpec& spec : rotated->parameters().specs()) {
    const std::vector<double> now = to_doubles(m.context.backend(), rotated->parameters().get(spec.name));
    const bool of_head =
        spec.name.find("q_norm") != std::string::npos || spec.name.find("k_norm") != std::string::npos;
    if (spec.name.find("norm") != std::string::npos && !of_head) {
      EXPECT_EQ(now, std::vector<double>(now.size(), 1.0)) << spec.name;
    }
    if (spec.name.ends_with("_proj.weight")) {
      EXPECT_GT(relative_difference(now, m.host(m.model.parameters().get(spec.name))), 0.1) << spec.name;
    }
  }
}

std::string name_of_case(const ::testing::TestParamInfo<std::tuple<Case, bool>>& of_case) {
  return std::get<0>(of_case.param).name + (std::get<1>(of_case.param) ? "_online" : "");
}
INSTANTIATE_TEST_SUITE_P(Models, Rotation,
                         ::testing::Combine(::testing::ValuesIn(cases()), ::testing::Bool()), name_of_case);

/// The most likely token of each row, and how far it stands above the next one, in standard deviations of the
/// row's logits.
struct Greedy {
  std::vector<std::size_t> tokens;
  std::vector<double> margins;
};

Greedy greedy(const std::vector<double>& logits, std::size_t vocab) {
  Greedy g;
  for (std::size_t first = 0; first < logits.size(); first += vocab) {
    std::vector<double> row(logits.begin() + static_cast<std::ptrdiff_t>(first),
                            logits.begin() + static_cast<std::ptrdiff_t>(first + vocab));
    g.tokens.push_back(static_cast<std::size_t>(std::max_element(row.begin(), row.end()) - row.begin()));
    double mean = 0, squares = 0;
    for (const double l : row) mean += l / static_cast<double>(vocab);
    for (const double l : row) squares += (l - mean) * (l - mean) / static_cast<double>(vocab);
    std::sort(row.begin(), row.end());
    g.margins.push_back((row[vocab - 1] - row[vocab - 2]) / std::sqrt(squares));
  }
  return g;
}

/// Sizes of 2^m, of 12 * 2^m, of other matrices' orders, and of blocks: of everything that is transformed.
ModelConfig random_config(std::mt19937& random) {
  const auto any = [&](std::initializer_list<std::int64_t> of) {
    return *(of.begin() + std::uniform_int_distribution<std::ptrdiff_t>(0, std::ssize(of) - 1)(random));
  };
  ModelConfig m = small_config();
  m.depth = 3;
  m.heads = any({1, 2, 3, 4, 6, 12});
  m.kv_heads = m.heads % 2 == 0 ? any({m.heads, m.heads / 2}) : any({m.heads, 1});
  m.own_head_dim = any({2, 4, 6, 8, 12, 24});
  m.width = any({12, 16, 18, 20, 24, 28, 32, 48, 60});
  m.ffn_hidden = any({7, 12, 16, 20, 24, 26, 36, 40, 48, 52, 96});
  m.qk_norm = any({0, 1}) == 1;
  m.tie_embeddings = any({0, 1}) == 1;
  return m;
}

// Of so few rows none decides so closely that fp32 would show: a decision or a token that changes is an error
// here, whatever its margin.
TEST(RotationOfAnyModel, ChangesNoDecisionNoTokenAndNoLogit) {
  for (unsigned seed = 0; seed < 48; ++seed) {
    std::mt19937 random(seed);
    const std::vector<ModelKind> kinds = model_kinds();
    const ModelKind& kind = kinds[seed % kinds.size()];
    const ModelConfig config = random_config(random);
    SCOPED_TRACE(fmt::format("seed {} {} width {} heads {}/{} x {} hidden {}", seed, kind.name, config.width,
                             config.heads, config.kv_heads, config.head_dim(), config.ffn_hidden));
    for (const DType dtype : {DType::F64, DType::F32}) {
      SmallModel m(dtype, config, kind.routing);
      m.fill(seed + 1);
      const Batch batch = m.random_batch(2, 16, seed);
      const Pass before = pass_of(m.context, m.model, batch, kind.rule);
      const auto rotated = rotate_model(m.context, m.model, {.seed = seed, .online = kAllOnline});
      const Pass after = pass_of(m.context, *rotated, batch, kind.rule);
      EXPECT_EQ(after.chosen, before.chosen);
      EXPECT_LT(relative_difference(after.logits, before.logits), dtype == DType::F64 ? 1e-11 : 1e-4);
      const auto vocab = static_cast<std::size_t>(config.vocab_size);
      const Greedy was = greedy(before.logits, vocab), is = greedy(after.logits, vocab);
      for (std::size_t i = 0; i < was.tokens.size(); ++i) {
        if (dtype == DType::F64 || was.margins[i] > 1e-4) {
          EXPECT_EQ(is.tokens[i], was.tokens[i]) << i;
        }
      }
    }
  }
}

// A rotated model is quantized with its transforms.
TEST(RotationOfAnyModel, KeepsItsTransformsWhenItsWeightsBecomeFewBits) {
  SmallModel m(DType::F32, of(24, 4, 2, true, true), routed(CausalMethod::Both));
  const auto rotated = rotate_model(m.context, m.model, {.seed = 2, .online = kAllOnline});
  const Batch batch = m.random_batch(2, 24, 5);
  const Causal rule{Causal::Logit::Predictor, 0.5};
  const Pass exact = pass_of(m.context, *rotated, batch, rule);
  Quantization q{.bits = 8, .online = kAllOnline};
  const QuantizedModel with = quantize_model(m.context, *rotated, q, quant_test::round_to_nearest);
  EXPECT_LT(relative_difference(pass_of(m.context, *with.model, batch, rule).logits, exact.logits), 0.15);
  q.online = {};
  const QuantizedModel without = quantize_model(m.context, *rotated, q, quant_test::round_to_nearest);
  EXPECT_GT(relative_difference(pass_of(m.context, *without.model, batch, rule).logits, exact.logits), 0.2);
}

// A channel that stands out is spread over all of them: what the rotation is for.
TEST(RotationOfOutliers, SpreadsThem) {
  SmallModel m(DType::F64, of(64, 4, 4, false, false), by(CausalMethod::None));
  Backend& backend = m.context.backend();
  const Tensor embedding = m.model.parameters().get("model.embed_tokens.weight");
  std::vector<double> values = m.host(embedding);
  for (std::size_t i = 5; i < values.size(); i += 64) values[i] *= 100;
  from_doubles(backend, embedding, values);
  const double before = greatest_outlier(m.context, m.model);
  const std::vector<std::int32_t> tokens = m.random_tokens(96, 4);
  const std::vector<double> stream_before = stream_outliers(m.context, m.model, TopK{}, tokens, 32);
  const auto rotated = rotate_model(m.context, m.model);
  const std::vector<double> stream_after = stream_outliers(m.context, *rotated, TopK{}, tokens, 32);
  ASSERT_EQ(stream_before.size(), 5U);  // behind 0 to 4 blocks
  for (std::size_t i = 0; i < stream_before.size(); ++i) {
    EXPECT_GT(stream_before[i], 4) << i;  // one element beside 63 that the blocks make larger
    EXPECT_LT(stream_after[i], 3) << i;   // as of random numbers
  }
  EXPECT_GT(before, 8);
  EXPECT_LT(greatest_outlier(m.context, *rotated), 0.6 * before);
}

}  // namespace
}  // namespace fathom::model_test
