// What models of experts have to agree with: dense models, and each other.
#include <algorithm>
#include <array>
#include <cmath>

#include <gtest/gtest.h>

#include "kernels/error.h"
#include "tests/model/small_model.h"

namespace fathom::model_test {
namespace {

constexpr std::int64_t kSeq = 16;

class Experts : public OnDevice<Device> {
 protected:
  DType dtype() const { return device() == Device::Cpu ? DType::F64 : DType::F32; }
  double tolerance() const { return device() == Device::Cpu ? 1e-12 : 2e-5; }
  SmallModel make(const RoutingConfig& routing) { return {dtype(), small_config(), routing, {}, device()}; }

  static void set(SmallModel& m, const std::string& name, const std::vector<double>& values) {
    from_doubles(m.context.backend(), m.model.parameters().get(name), values);
  }

  /// Column 0 of the stream is made large and positive: a router that reads only that column gives every
  /// token a score of one sign, far from zero.
  static void make_first_column_large(SmallModel& m) {
    const char* table = "model.embed_tokens.weight";
    std::vector<double> values = m.host(m.model.parameters().get(table));
    for (std::size_t i = 0; i < values.size(); i += 16) values[i] = 30.0;
    set(m, table, values);
  }

  void expect_same(SmallModel& a, SmallModel& b, const std::vector<std::string>& only_a) {
    const LossSums of_a = a.backward(a.random_batch(2, kSeq, 3), TopK{});
    const LossSums of_b = b.backward(b.random_batch(2, kSeq, 3), TopK{});
    EXPECT_NEAR(of_a.cross_entropy, of_b.cross_entropy, tolerance() * of_b.cross_entropy);
    const Snapshot gradients_a = a.gradients(), gradients_b = b.gradients();
    EXPECT_EQ(gradients_a.size(), gradients_b.size() + only_a.size());
    for (const auto& [name, gradient] : gradients_b) {
      const std::string in_a = renamed_.contains(name) ? renamed_.at(name) : name;
      ASSERT_TRUE(gradients_a.contains(in_a)) << in_a;
      std::vector<double> shared = gradients_a.at(in_a);
      shared.resize(gradient.size());  // of a router with no-ops, the experts' rows
      EXPECT_LT(relative_difference(shared, gradient), tolerance()) << name;
    }
    for (const std::string& name : only_a) EXPECT_TRUE(gradients_a.contains(name)) << name;
  }

  std::map<std::string, std::string> renamed_;  // b's names in a
};

// The softmax over one choice is 1, and its only expert takes every token.
TEST_P(Experts, OneAtFullCapacityIsTheDenseModel) {
  RoutingConfig one = with_experts(by(CausalMethod::None), RoutingKind::Moe);
  one.experts.count = 1;
  SmallModel moe = make(one), dense = make({});
  std::vector<std::string> routers;
  for (int layer = 0; layer < 4; ++layer) {
    const std::string mlp = "model.layers." + std::to_string(layer) + ".mlp.";
    routers.push_back(mlp + "router.weight");
    for (const std::string part : {"gate_up_proj.weight", "down_proj.weight"}) {
      set(moe, mlp + "experts." + part, dense.host(dense.model.parameters().get(mlp + part)));
      renamed_[mlp + part] = mlp + "experts." + part;
    }
  }
  expect_same(moe, dense, routers);
  const Snapshot gradients = moe.gradients();
  for (const std::string& name : routers) {
    for (const double g : gradients.at(name)) EXPECT_EQ(g, 0.0) << name;
  }
}

// Where every token has room with its only choice, as where its only expert chooses all tokens.
TEST_P(Experts, TokensThatChooseTheOnlyExpertAreExpertChoice) {
  RoutingConfig expert = with_experts(by(CausalMethod::None), RoutingKind::Moe),
                token = tokens_choose(by(CausalMethod::None), RoutingKind::Moe, 1);
  expert.experts.count = token.experts.count = 1;
  token.experts.balance_weight = token.experts.z_weight = 0;
  SmallModel a = make(expert), b = make(token);
  EXPECT_EQ(a.backward(a.random_batch(2, kSeq, 3), TopK{}).cross_entropy,
            b.backward(b.random_batch(2, kSeq, 3), TopK{}).cross_entropy);
  EXPECT_EQ(a.gradients(), b.gradients());
}

// With room for all, nothing is dropped, and each token is in as many slots as it chose experts.
TEST_P(Experts, TokensWithoutLimitAreNeverDropped) {
  SmallModel free = make(tokens_choose(by(CausalMethod::None), RoutingKind::Moe, 2));
  SmallModel roomy =
      make(tokens_choose(by(CausalMethod::None), RoutingKind::Moe, 2, 1.5));  // 1.5 * 2 * 16 / 3 = 16
  EXPECT_EQ(free.backward(free.random_batch(2, kSeq, 3), TopK{}).cross_entropy,
            roomy.backward(roomy.random_batch(2, kSeq, 3), TopK{}).cross_entropy);
  EXPECT_EQ(free.gradients(), roomy.gradients());
  for (const ExpertLayer& layer :
       free.model.forward(free.context, free.random_batch(2, kSeq, 3), TopK{}).experts) {
    const std::vector<std::int32_t> slots =
        to_host<std::int32_t>(free.context.backend(), layer.dispatch.slots);
    EXPECT_EQ(std::count_if(slots.begin(), slots.end(), [](std::int32_t s) { return s >= 0; }), 2 * 2 * kSeq);
  }
}

/// What two sequences lose together, and each alone.
std::array<LossSums, 3> losses_of_two(SmallModel& m) {
  const std::vector<std::int32_t> tokens = m.random_tokens(2 * kSeq, 3),
                                  targets = m.random_tokens(2 * kSeq, 4);
  const auto sums = [&](std::int64_t first, std::int64_t count) {
    const auto part = [&](const std::vector<std::int32_t>& v) {
      return std::vector<std::int32_t>(v.begin() + first * kSeq, v.begin() + (first + count) * kSeq);
    };
    const Batch batch = make_batch(m.context, count, kSeq, part(tokens), part(targets));
    return m.model.objective(m.context, batch, m.model.forward(m.context, batch, TopK{}), 1.0);
  };
  return {sums(0, 2), sums(0, 1), sums(1, 1)};
}

// A sequence's experts, drops and losses do not depend on the sequences beside it.
TEST_P(Experts, SequencesAreIndependent) {
  for (const RoutingConfig& routing :
       {with_experts(by(CausalMethod::None), RoutingKind::Moe),
        tokens_choose(by(CausalMethod::None), RoutingKind::ModeIntegrated, 2, 0.8)}) {
    SmallModel m = make(routing);
    const auto [both, first, second] = losses_of_two(m);
    EXPECT_NEAR(both.cross_entropy, first.cross_entropy + second.cross_entropy,
                tolerance() * both.cross_entropy);
    EXPECT_NEAR(both.balance, first.balance + second.balance, tolerance() * (1 + both.balance));
    EXPECT_NEAR(both.z, first.z + second.z, tolerance() * (1 + both.z));
  }
}

TEST_P(Experts, WithoutNoopsIntegratedIsMoe) {
  RoutingConfig none = with_experts(by(CausalMethod::None), RoutingKind::ModeIntegrated);
  none.experts.noop = 0;
  SmallModel integrated = make(none), moe = make(with_experts(by(CausalMethod::None), RoutingKind::Moe));
  EXPECT_EQ(integrated.backward(integrated.random_batch(2, kSeq, 3), TopK{}).cross_entropy,
            moe.backward(moe.random_batch(2, kSeq, 3), TopK{}).cross_entropy);
  EXPECT_EQ(integrated.gradients(), moe.gradients());
}

// No-ops that no token has any affinity for are as good as none.
TEST_P(Experts, WithIdleNoopsIntegratedIsMoe) {
  SmallModel integrated = make(with_experts(by(CausalMethod::None), RoutingKind::ModeIntegrated));
  SmallModel moe = make(with_experts(by(CausalMethod::None), RoutingKind::Moe));
  make_first_column_large(integrated);
  make_first_column_large(moe);
  for (int layer = 0; layer < 4; ++layer) {
    const std::string name = "model.layers." + std::to_string(layer) + ".mlp.router.weight";
    std::vector<double> values = moe.host(moe.model.parameters().get(name));
    for (int noop = 0; noop < 2; ++noop) {
      values.push_back(-1e4);
      values.resize(values.size() + 15, 0.0);
    }
    set(integrated, name, values);
  }
  const ForwardResult result =
      integrated.model.forward(integrated.context, integrated.random_batch(2, kSeq, 3), TopK{});
  for (const ExpertLayer& layer : result.experts) {
    for (const double p : integrated.host(layer.affinity.rows(3, 5))) ASSERT_EQ(p, 0.0);
  }
  expect_same(integrated, moe, {});
}

// A no-op takes no tokens: it only takes affinity from the experts.
TEST_P(Experts, NoopsDrawAffinityAndNothingElse) {
  SmallModel integrated = make(with_experts(by(CausalMethod::None), RoutingKind::ModeIntegrated));
  const ForwardResult result =
      integrated.model.forward(integrated.context, integrated.random_batch(2, kSeq, 3), TopK{});
  ASSERT_EQ(result.experts.size(), 4U);
  for (const ExpertLayer& layer : result.experts) {
    EXPECT_EQ(layer.affinity.shape(), (Shape{5, 2 * kSeq}));
    EXPECT_EQ(layer.dispatch.rows.size(), 3 * 2 * (kSeq / 3));
    EXPECT_EQ(layer.dispatch.slots.shape(), (Shape{3, 2 * kSeq}));
  }
}

TEST_P(Experts, StagedAtCapacityOneAndUnitGateIsMoe) {
  for (const Gate gate : {Gate::Sigmoid, Gate::Tanh}) {
    SmallModel staged = make(with_experts(routed(CausalMethod::None, gate, 1.0), RoutingKind::ModeStaged));
    SmallModel moe = make(with_experts(by(CausalMethod::None), RoutingKind::Moe));
    make_first_column_large(staged);
    make_first_column_large(moe);
    std::vector<double> router(16, 0.0);
    router[0] = 100.0;  // scores in the thousands, where a sigmoid and a tanh are exactly 1
    const std::vector<std::string> routers = {"model.layers.1.router.weight", "model.layers.3.router.weight"};
    for (const std::string& name : routers) set(staged, name, router);
    expect_same(staged, moe, routers);
  }
}

// The experts of a routed block choose among the tokens that it kept.
TEST_P(Experts, StagedChooseAmongKeptTokens) {
  SmallModel staged = make(with_experts(routed(CausalMethod::Aux, Gate::Raw, 0.5), RoutingKind::ModeStaged));
  const ForwardResult result = staged.model.forward(staged.context, staged.random_batch(2, kSeq, 3), TopK{});
  ASSERT_EQ(result.experts.size(), 4U);
  for (std::size_t i = 0; i < 4; ++i) {
    const std::int64_t tokens = i % 2 == 1 ? kSeq / 2 : kSeq;
    EXPECT_EQ(result.experts[i].layer, static_cast<std::int64_t>(i));
    EXPECT_EQ(result.experts[i].affinity.dim(1), 2 * tokens);
    EXPECT_EQ(result.experts[i].dispatch.rows.size(), 3 * 2 * (tokens / 3));
  }
}

// --- the causal rule of experts that choose ---

// A threshold that everything is above is room for everything.
TEST_P(Experts, AboveEveryThresholdIsFullCapacity) {
  for (const CausalMethod method : {CausalMethod::Aux, CausalMethod::Predictor}) {
    SmallModel m = make(with_experts(by(method), RoutingKind::ModeIntegrated));
    RoutingConfig all = with_experts(by(method), RoutingKind::ModeIntegrated, 3.0);
    SmallModel roomy = make(all);
    const Batch batch = m.random_batch(2, kSeq, 3);
    const Causal rule{causal_rule(m.model.routing()).logit, 1e-9};
    const ForwardResult served = m.model.forward(m.context, batch, rule);
    const ForwardResult whole = roomy.model.forward(roomy.context, batch, TopK{});
    EXPECT_LT(relative_difference(m.host(served.hidden), roomy.host(whole.hidden)), tolerance());
    for (const ExpertLayer& e : served.experts) {
      EXPECT_EQ(e.dispatch.taken, (std::vector<std::int64_t>{2 * kSeq, 2 * kSeq, 2 * kSeq}));
    }
  }
}

// And below every threshold there is no MLP, and no product without rows.
TEST_P(Experts, BelowEveryThresholdIsNoMlp) {
  SmallModel m = make(with_experts(by(CausalMethod::Aux), RoutingKind::Moe));
  SmallModel silent = make(with_experts(by(CausalMethod::Aux), RoutingKind::Moe));
  for (int layer = 0; layer < 4; ++layer) {
    const std::string down = "model.layers." + std::to_string(layer) + ".mlp.experts.down_proj.weight";
    silent.context.backend().fill(silent.model.parameters().get(down), 0.0);
  }
  const Batch batch = m.random_batch(2, kSeq, 3);
  const ForwardResult served = m.model.forward(m.context, batch, Causal{Causal::Logit::Router, 1 - 1e-9});
  EXPECT_EQ(m.host(served.hidden), silent.host(silent.model.forward(silent.context, batch, TopK{}).hidden));
  for (const ExpertLayer& e : served.experts) {
    EXPECT_EQ(e.dispatch.taken, (std::vector<std::int64_t>{0, 0, 0}));
  }
}

// Each expert takes what is above the threshold and nothing else, whatever the other experts take.
TEST_P(Experts, EachTakesTheRowsAboveTheThreshold) {
  constexpr double kThreshold = 0.4;
  for (const CausalMethod method : {CausalMethod::Aux, CausalMethod::Predictor, CausalMethod::Both}) {
    SmallModel m = make(with_experts(by(method), RoutingKind::ModeIntegrated));
    Causal rule = causal_rule(m.model.routing());
    rule.threshold = kThreshold;
    const ForwardResult result = m.model.forward(m.context, m.random_batch(2, kSeq, 3), rule);
    for (const ExpertLayer& e : result.experts) {
      const std::vector<double> logits = m.host(method == CausalMethod::Aux ? e.scores : e.predicted);
      ASSERT_EQ(logits.size(), 5U * 2 * kSeq);  // three experts, two no-ops
      const std::vector<std::int32_t> slots = to_host<std::int32_t>(m.context.backend(), e.dispatch.slots);
      std::vector<std::int64_t> taken(3);
      for (std::size_t i = 0; i < slots.size(); ++i) {
        EXPECT_EQ(slots[i] >= 0, 1 / (1 + std::exp(-logits[i])) > kThreshold) << i;
        taken[i / (2 * kSeq)] += slots[i] >= 0 ? 1 : 0;
      }
      EXPECT_EQ(e.dispatch.taken, taken);
    }
  }
}

// The predictor decides and does not weigh: other logits of the same signs change no bit.
TEST_P(Experts, PredictorsAreNoGates) {
  SmallModel m = make(with_experts(by(CausalMethod::Predictor), RoutingKind::Moe));
  const Batch batch = m.random_batch(2, kSeq, 3);
  const auto hidden = [&] {
    return m.host(m.model.forward(m.context, batch, causal_rule(m.model.routing())).hidden);
  };
  const std::vector<double> before = hidden();
  for (int layer = 0; layer < 4; ++layer) {
    for (const std::string part : {"weight", "bias"}) {
      const std::string name = "model.layers." + std::to_string(layer) + ".mlp.router_predictor.2." + part;
      std::vector<double> values = m.host(m.model.parameters().get(name));
      for (double& x : values) x *= 3;
      set(m, name, values);
    }
  }
  EXPECT_EQ(hidden(), before);
}

// What a sequence's experts choose and are taught does not depend on the sequences beside it.
TEST_P(Experts, ForetellingIsOfEachSequence) {
  SmallModel m = make(with_experts(by(CausalMethod::Both), RoutingKind::ModeIntegrated));
  const auto [both, first, second] = losses_of_two(m);
  EXPECT_NEAR(both.expert_aux, first.expert_aux + second.expert_aux, tolerance() * both.expert_aux);
  EXPECT_NEAR(both.expert_predictor, first.expert_predictor + second.expert_predictor,
              tolerance() * both.expert_predictor);
}

INSTANTIATE_TEST_SUITE_P(Devices, Experts, ::testing::ValuesIn(testing_support::devices()), device_name);

TEST(ExpertsWithoutFuture, AreRefusedWhereNoneWasTrained) {
  EXPECT_THROW(causal_rule(with_experts(by(CausalMethod::None), RoutingKind::Moe)), UserError);
  EXPECT_THROW(causal_rule(with_experts(routed(CausalMethod::None), RoutingKind::ModeStaged)), UserError);
  EXPECT_NO_THROW(causal_rule(tokens_choose(by(CausalMethod::None), RoutingKind::Moe, 1)));
}

}  // namespace
}  // namespace fathom::model_test
