// What models of experts have to agree with: dense models, and each other.
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
  RoutingConfig one = with_experts({}, RoutingKind::Moe);
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
  for (const std::string& name : routers) {
    for (const double g : moe.gradients().at(name)) EXPECT_EQ(g, 0.0) << name;
  }
}

TEST_P(Experts, WithoutNoopsIntegratedIsMoe) {
  RoutingConfig none = with_experts({}, RoutingKind::ModeIntegrated);
  none.experts.noop = 0;
  SmallModel integrated = make(none), moe = make(with_experts({}, RoutingKind::Moe));
  EXPECT_EQ(integrated.backward(integrated.random_batch(2, kSeq, 3), TopK{}).cross_entropy,
            moe.backward(moe.random_batch(2, kSeq, 3), TopK{}).cross_entropy);
  EXPECT_EQ(integrated.gradients(), moe.gradients());
}

// No-ops that no token has any affinity for are as good as none.
TEST_P(Experts, WithIdleNoopsIntegratedIsMoe) {
  SmallModel integrated = make(with_experts({}, RoutingKind::ModeIntegrated));
  SmallModel moe = make(with_experts({}, RoutingKind::Moe));
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
  SmallModel integrated = make(with_experts({}, RoutingKind::ModeIntegrated));
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
    SmallModel moe = make(with_experts({}, RoutingKind::Moe));
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

INSTANTIATE_TEST_SUITE_P(Devices, Experts, ::testing::ValuesIn(testing_support::devices()), device_name);

// --- decoding needs a rule that does without the future ---

TEST(ExpertsWithoutFuture, AreRefused) {
  SmallModel moe(DType::F32, small_config(), with_experts({}, RoutingKind::Moe));
  const Batch batch = moe.random_batch(1, kSeq, 3);
  EXPECT_THROW(moe.model.forward(moe.context, batch, Causal{}), InternalError);
  EXPECT_THROW(causal_rule(moe.model.routing()), UserError);
  EXPECT_THROW(causal_rule(with_experts(routed(CausalMethod::Both), RoutingKind::ModeStaged)), UserError);
}

}  // namespace
}  // namespace fathom::model_test
