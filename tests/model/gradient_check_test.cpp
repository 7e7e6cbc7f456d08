// Gradients of whole models in double against finite differences: every parameter tensor, every entry of
// small ones and a sample of the others.
//
// The stencil has five points, so its own error is of order h^4: (f(-2h) - 8 f(-h) + 8 f(h) - f(2h)) / 12h.
// Two things are no derivatives by design: the predictors read a stream whose gradient is stopped, so that
// their loss counts for their own parameters only; and the choice of tokens is constant, so the perturbed
// models have to choose the same ones, which is checked.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/model/small_model.h"

namespace fathom::model_test {
namespace {

constexpr std::int64_t kBatch = 2;
constexpr std::int64_t kSeq = 12;
constexpr std::int64_t kSample = 24;  // entries of a tensor that are looked at
constexpr double kStep = 2e-4;

struct Case {
  std::string name;
  ModelConfig model;
  RoutingConfig routing;
  SelectionRule rule = TopK{};
  std::vector<std::int32_t> documents;
  Recompute recompute = Recompute::None;
  unsigned seed = 11;  // of the tokens, where no choice is so close that a step changes it
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }
};

class GradientCheck : public ::testing::TestWithParam<Case> {
 protected:
  struct Value {
    double main = 0;       // cross-entropy and the routers' own loss
    double predictor = 0;  // the predictors' loss
  };

  GradientCheck() : m_(DType::F64, GetParam().model, GetParam().routing) {
    m_.model.set_recompute(GetParam().recompute);
    batch_ = m_.random_batch(kBatch, kSeq, GetParam().seed, GetParam().documents);
  }

  Value evaluate() {
    const ForwardResult result = m_.model.forward(m_.context, batch_, GetParam().rule);
    std::vector<std::vector<std::int32_t>> chosen;
    for (const RoutedLayer& r : result.routing) {
      chosen.push_back(to_host<std::int32_t>(m_.context.backend(), r.indices));
    }
    for (const ExpertLayer& e : result.experts) {
      chosen.push_back(to_host<std::int32_t>(m_.context.backend(), e.dispatch.rows));
    }
    if (chosen_.empty()) chosen_ = chosen;
    EXPECT_EQ(chosen, chosen_) << "the perturbation changed the choice of tokens";
    const LossSums sums = m_.model.objective(m_.context, batch_, result, 1.0);
    const auto rows = static_cast<double>(sums.rows);
    const RoutingConfig& routing = m_.model.routing();
    double main = sums.cross_entropy + routing.causal.aux_weight * (sums.aux + sums.expert_aux);
    if (routing.tokens_choose()) {
      main += routing.experts.balance_weight * sums.balance + routing.experts.z_weight * sums.z;
    }
    return {main / rows, (sums.predictor + sums.expert_predictor) / rows};
  }

  double derivative(const Tensor& parameter, std::vector<double>& values, std::size_t i, bool of_predictor) {
    const auto at = [&](double offset) {
      const double kept = values[i];
      values[i] = kept + offset;
      from_doubles(m_.context.backend(), parameter, values);
      const Value v = evaluate();
      values[i] = kept;
      return of_predictor ? v.predictor : v.main;
    };
    const double slope = (at(-2 * kStep) - 8 * at(-kStep) + 8 * at(kStep) - at(2 * kStep)) / (12 * kStep);
    from_doubles(m_.context.backend(), parameter, values);
    return slope;
  }

  SmallModel m_;
  Batch batch_;
  std::vector<std::vector<std::int32_t>> chosen_;
};

TEST_P(GradientCheck, MatchesFiniteDifferences) {
  m_.backward(batch_, GetParam().rule);
  double worst = 0;
  std::string worst_name;
  for (const ParameterSpec& spec : m_.model.parameters().specs()) {
    const Tensor& parameter = m_.model.parameters().get(spec.name);
    const std::vector<double> gradient = m_.host(parameter.bound_gradient());
    std::vector<double> values = m_.host(parameter);
    double scale = 0;
    for (double g : gradient) scale = std::max(scale, std::abs(g));
    EXPECT_GT(scale, 1e-6) << spec.name << " has no gradient to check";
    const auto n = static_cast<std::int64_t>(values.size());
    const std::int64_t stride = std::max<std::int64_t>(1, n / kSample) | 1;  // odd: no column is left out
    for (std::int64_t i = 0; i < n; i += stride) {
      const auto at = static_cast<std::size_t>(i);
      const double slope = derivative(parameter, values, at, spec.group == ParameterGroup::Predictor);
      const double error = std::abs(slope - gradient[at]) / scale;
      EXPECT_LT(error, 1e-7) << spec.name << "[" << i << "]: " << gradient[at] << ", by differences "
                             << slope;
      if (error > worst) worst = error, worst_name = spec.name;
    }
  }
  RecordProperty("worst_relative_error", fmt::format("{:.2e} ({})", worst, worst_name));
  fmt::print("worst relative error {:.2e}: {}\n", worst, worst_name);
}

std::vector<Case> cases() {
  const ModelConfig base = small_config();
  ModelConfig grouped = base;
  grouped.kv_heads = 2;
  ModelConfig normed = grouped;
  normed.qk_norm = true;
  ModelConfig wide = normed;  // heads that do not divide the width among them
  wide.own_head_dim = 6;
  ModelConfig tied = base;
  tied.tie_embeddings = true;
  const std::vector<std::int32_t> documents = {0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,  //
                                               0, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2};
  const RoutingConfig none = by(CausalMethod::None);
  const RoutingConfig both = routed(CausalMethod::Both);
  return {
      {"dense", base, none, TopK{}, {}},
      {"dense_gqa", grouped, none, TopK{}, {}},
      {"dense_qk_norm", normed, none, TopK{}, {}},
      {"dense_tied", tied, none, TopK{}, {}},
      {"dense_wide_heads", wide, none, TopK{}, {}},
      {"mod_wide_heads", wide, routed(CausalMethod::Both, Gate::Sigmoid), TopK{}, {}},
      {"dense_documents", base, none, TopK{}, documents},
      {"mod_raw", base, both, TopK{}, {}},
      {"mod_sigmoid", base, routed(CausalMethod::Both, Gate::Sigmoid), TopK{}, {}},
      {"mod_tanh", base, routed(CausalMethod::Both, Gate::Tanh), TopK{}, {}},
      {"mod_aux_recompute", base, routed(CausalMethod::Aux), TopK{}, {}, Recompute::Block},
      {"mod_gqa_qk_norm_documents", normed, both, TopK{}, documents},
      {"mod_tied_half", tied, routed(CausalMethod::Both, Gate::Sigmoid, 0.5), TopK{}, {}},
      {"mod_stochastic", base, both, Stochastic{3, 5}, {}},
      {"mod_causal_by_router", base, both, Causal{Causal::Logit::Router, 0.5}, {}},
      {"mod_causal_by_predictor_documents", base, both, Causal{Causal::Logit::Predictor, 0.5}, documents},
      {"moe", base, with_experts(none, RoutingKind::Moe), TopK{}, {}},
      {"moe_few_recompute", normed, with_experts(none, RoutingKind::Moe, 0.5), TopK{}, {}, Recompute::Block},
      {"moe_many_documents", base, with_experts(none, RoutingKind::Moe, 2.0), TopK{}, documents,
       Recompute::None, 13},
      {"mode_integrated", tied, with_experts(none, RoutingKind::ModeIntegrated), TopK{}, {}},
      {"mode_staged",
       base,
       with_experts(routed(CausalMethod::Both, Gate::Sigmoid, 0.5), RoutingKind::ModeStaged),
       TopK{},
       {}},
      {"moe_aux", base, with_experts(by(CausalMethod::Aux), RoutingKind::Moe), TopK{}, {}},
      {"moe_both_recompute",
       base,
       with_experts(by(CausalMethod::Both), RoutingKind::Moe),
       TopK{},
       {},
       Recompute::Block},
      {"mode_integrated_predictor_documents", normed,
       with_experts(by(CausalMethod::Predictor), RoutingKind::ModeIntegrated), TopK{}, documents},
      {"mode_integrated_causal_by_router",
       base,
       with_experts(by(CausalMethod::Both), RoutingKind::ModeIntegrated),
       Causal{Causal::Logit::Router, 0.4},
       {}},
      {"mode_staged_causal_by_predictor",
       base,
       with_experts(routed(CausalMethod::Both, Gate::Sigmoid, 0.5), RoutingKind::ModeStaged),
       Causal{Causal::Logit::Predictor, 0.5},
       {}},
      {"token_top1", base, tokens_choose(none, RoutingKind::Moe, 1, 1.0), TopK{}, {}},
      {"token_top2_recompute",
       base,
       tokens_choose(none, RoutingKind::Moe, 2, 0.8),
       TopK{},
       {},
       Recompute::Block},
      {"token_integrated_documents", base, tokens_choose(none, RoutingKind::ModeIntegrated, 2), TopK{},
       documents},
      {"token_staged",
       base,
       tokens_choose(routed(CausalMethod::Both, Gate::Sigmoid, 0.5), RoutingKind::ModeStaged, 2, 1.0),
       TopK{},
       {},
       Recompute::None,
       13},
      {"token_staged_causal",
       base,
       tokens_choose(routed(CausalMethod::Both, Gate::Tanh, 0.5), RoutingKind::ModeStaged, 1),
       Causal{Causal::Logit::Predictor, 0.5},
       {}},
      {"mode_staged_stochastic_recompute",
       base,
       with_experts(routed(CausalMethod::Aux, Gate::Raw, 0.5), RoutingKind::ModeStaged),
       Stochastic{3, 5},
       {},
       Recompute::Block},
  };
}

INSTANTIATE_TEST_SUITE_P(Models, GradientCheck, ::testing::ValuesIn(cases()),
                         [](const auto& p) { return p.param.name; });

// What the stopped gradient means: a predictor's loss reaches its own parameters and no other.
void expect_only_predictors(const RoutingConfig& predicted, const RoutingConfig& plain,
                            std::size_t expected) {
  SmallModel with(DType::F64, small_config(), predicted);
  SmallModel without(DType::F64, small_config(), plain);
  with.backward(with.random_batch(kBatch, kSeq, 11), TopK{});
  without.backward(without.random_batch(kBatch, kSeq, 11), TopK{});
  const Snapshot reference = without.gradients();
  std::size_t predictors = 0;
  for (const auto& [name, gradient] : with.gradients()) {
    if (name.find("router_predictor") != std::string::npos) {
      ++predictors;
      EXPECT_TRUE(std::any_of(gradient.begin(), gradient.end(), [](double g) { return g != 0; })) << name;
    } else {
      EXPECT_EQ(gradient, reference.at(name)) << name;
    }
  }
  EXPECT_EQ(predictors, expected);
}

TEST(StoppedGradient, PredictorLossReachesOnlyPredictors) {
  expect_only_predictors(routed(CausalMethod::Predictor), routed(CausalMethod::None),
                         8);  // four in each of two routed blocks
}

TEST(StoppedGradient, OfExpertsToo) {
  const auto experts = [](CausalMethod method) {
    return with_experts(routed(method, Gate::Sigmoid, 0.5), RoutingKind::ModeStaged);
  };
  expect_only_predictors(experts(CausalMethod::Predictor), experts(CausalMethod::None),
                         8 + 16);  // and in each of four blocks with experts
}

}  // namespace
}  // namespace fathom::model_test
