// A rotated model computes what it was: logits, and every routing decision, in double.
#include "infer/quant/rotate.h"

#include <cmath>

#include <gtest/gtest.h>

#include "infer/quant/outliers.h"
#include "tests/model/small_model.h"

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

class Rotation : public ::testing::TestWithParam<Case> {};

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

TEST_P(Rotation, ChangesNoLogitAndNoDecision) {
  const Case& k = GetParam();
  SmallModel m(DType::F64, k.model, k.routing);
  const Batch batch = m.random_batch(3, 24, 5);
  const Pass before = pass_of(m.context, m.model, batch, k.rule);
  const auto rotated = rotate_model(m.context, m.model, {.seed = 9});
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

INSTANTIATE_TEST_SUITE_P(Models, Rotation, ::testing::ValuesIn(cases()),
                         [](const auto& of_case) { return of_case.param.name; });

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
