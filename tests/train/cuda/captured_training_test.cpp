// Whole steps as one launch, forward to update, the next one launched before the last one's report was read:
// to the bit what the same ops do one by one.
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "src/config/resolve.h"
#include "tests/devices.h"
#include "tests/forwarding_backend.h"
#include "train/step.h"

namespace fathom {
namespace {

// The GPU, but everything is launched by itself.
class OpByOp final : public testing_support::ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;
  bool can_capture() const override { return false; }
};

enum class Way { OneByOne, Captured };

struct Case {
  const char* name;
  RoutingKind kind = RoutingKind::None;
  Selection selection = Selection::TopK;
  const char* precision = "bf16";
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name << ", " << c.precision; }
};

Config config_of(const Case& of) {
  Config c;
  c.model.vocab_size = 256;
  c.model.width = 64;
  c.model.depth = 4;
  c.model.heads = 4;
  c.model.ffn_hidden = 128;
  c.train.seq_len = 32;
  c.train.batch_tokens = 8 * c.train.seq_len;
  c.train.micro_batch = 4;
  c.train.steps = 100;
  c.train.grad_clip = 0.5;  // clips at times
  c.train.precision = of.precision;
  c.train.on_spike = OnSpike::Skip;
  c.train.spike_factor = 1e6;
  c.routing.kind = of.kind;
  c.routing.selection = of.selection;
  c.routing.experts.count = 4;
  if (of.kind != RoutingKind::None && of.selection == Selection::TopK)
    c.routing.causal.method = CausalMethod::Both;
  c.deterministic = true;
  return resolve(c);
}

std::shared_ptr<Backend> open(Way way) {
  std::unique_ptr<Backend> gpu = make_cuda_backend({.deterministic = true}, 0);
  if (way == Way::Captured) return gpu;
  return std::make_shared<OpByOp>(std::move(gpu));
}

// All that an update changes.
struct State {
  std::vector<float> masters, working, m, v;
  bool operator==(const State&) const = default;
};

struct Training {
  Training(const Case& of, Way way)
      : config(config_of(of)),
        c(open(way), of.precision == std::string("bf16") ? DType::BF16 : DType::F32),
        model(c, config.model, config.routing, true),
        optimizer(c, model.parameters(), config.train),
        stepper(c, model, optimizer, config, [this](std::int64_t first, std::int64_t count) {
          const std::int64_t seq = config.train.seq_len;
          std::vector<std::int32_t> tokens, targets;
          for (std::int64_t i = 0; i < count * seq; ++i) {
            const std::int64_t at = first * seq + i;
            tokens.push_back(static_cast<std::int32_t>(at * at % 251));
            targets.push_back(static_cast<std::int32_t>((at + 1) * (at + 1) % 251));
          }
          return make_host_batch(count, seq, tokens, targets);
        }) {
    model.initialise(c, 1);
  }

  static double lr(std::int64_t step) { return 1e-3 * static_cast<double>(step % 5); }

  bool launch(std::int64_t step) { return stepper.launch({step, step * 8, lr(step), mean}); }

  void go(std::int64_t step) { EXPECT_TRUE(launch(step)); }

  // The steps up to `end`, ahead where it can.
  std::vector<StepOutcome> run(std::int64_t end) {
    std::vector<StepOutcome> outcomes;
    for (; next < end; ++next) {
      if (!stepper.launched(next)) go(next);
      if (stepper.runs_ahead() && next + 1 < end) go(next + 1);
      outcomes.push_back(stepper.read());
      if (outcomes.back().applied) take_loss(mean, outcomes.back().loss);
    }
    return outcomes;
  }

  State state() const {
    const ParameterSet& p = model.parameters();
    Backend& b = c.backend();
    return {to_floats(b, p.masters()),
            p.working().defined() ? to_floats(b, p.working()) : std::vector<float>{},
            to_floats(b, optimizer.state().m), to_floats(b, optimizer.state().v)};
  }

  Config config;
  Context c;
  mutable Transformer model;
  mutable AdamW optimizer;
  StepRunner stepper;
  LossMean mean;
  std::int64_t next = 0;
};

void expect_same(const std::vector<StepOutcome>& a, const std::vector<StepOutcome>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) {
    EXPECT_TRUE(a[i].applied) << i;
    EXPECT_EQ(a[i].applied, b[i].applied) << i;
    EXPECT_EQ(a[i].loss, b[i].loss) << i;
    EXPECT_EQ(a[i].norms.model, b[i].norms.model) << i;
    EXPECT_EQ(a[i].norms.predictor, b[i].norms.predictor) << i;
    ASSERT_EQ(a[i].routing.size(), b[i].routing.size());
    for (std::size_t layer = 0; layer < a[i].routing.size(); ++layer)
      EXPECT_EQ(a[i].routing[layer].mean, b[i].routing[layer].mean) << i;
  }
}

class CudaCapturedTraining : public testing_support::OnCuda<::testing::TestWithParam<Case>> {};

TEST_P(CudaCapturedTraining, IsOpByOpToTheBit) {
  Training captured(GetParam(), Way::Captured), one_by_one(GetParam(), Way::OneByOne);
  expect_same(captured.run(9), one_by_one.run(9));
  EXPECT_TRUE(captured.stepper.runs_ahead());
  EXPECT_FALSE(one_by_one.stepper.runs_ahead());
  const State after = captured.state();
  EXPECT_EQ(after, one_by_one.state());
  // And goes on after a pause in which nothing was under way.
  expect_same(captured.run(12), one_by_one.run(12));
  EXPECT_EQ(captured.state(), one_by_one.state());
  EXPECT_NE(captured.state().masters, after.masters);
}

TEST_P(CudaCapturedTraining, FollowsTheLearningRate) {
  Training t(GetParam(), Way::Captured);
  t.run(5);
  const State before = t.state();
  t.run(6);  // at rate 0
  const State still = t.state();
  EXPECT_EQ(still.masters, before.masters);
  EXPECT_NE(still.m, before.m);
  t.run(7);
  EXPECT_NE(t.state().masters, before.masters);
}

// The weights are broken for one step, and whole again before the one behind it runs: that one's numbers are
// finite, but it was launched for parameters that the other was to have changed.
TEST_P(CudaCapturedTraining, AStepThatIsNotFiniteChangesNothingNorDoesTheOneBehindIt) {
  Training t(GetParam(), Way::Captured), whole(GetParam(), Way::OneByOne);
  t.run(6);
  whole.run(6);
  const Tensor& weight = t.model.parameters().get("model.norm.weight");
  const std::vector<float> good = to_floats(t.c.backend(), weight);
  std::vector<float> bad = good;
  bad[3] = std::numeric_limits<float>::quiet_NaN();
  const State before = t.state();
  from_host(t.c.backend(), weight, bad);
  ASSERT_TRUE(t.launch(6));
  from_host(t.c.backend(), weight, good);
  ASSERT_TRUE(t.launch(7));
  const StepOutcome broken = t.stepper.read();
  EXPECT_FALSE(broken.finite());
  EXPECT_FALSE(broken.applied);
  const StepOutcome behind = t.stepper.read();
  EXPECT_TRUE(behind.finite());
  EXPECT_FALSE(behind.applied);
  EXPECT_EQ(t.state(), before);
  // It was as if they had not been launched.
  expect_same(t.run(9), whole.run(9));
  EXPECT_EQ(t.state(), whole.state());
}

TEST_P(CudaCapturedTraining, WhatIsForgottenIsLaunchedAgain) {
  Training t(GetParam(), Way::Captured), whole(GetParam(), Way::OneByOne);
  t.run(6);
  whole.run(6);
  const Tensor& weight = t.model.parameters().get("model.norm.weight");
  const std::vector<float> good = to_floats(t.c.backend(), weight);
  std::vector<float> bad = good;
  bad[3] = std::numeric_limits<float>::infinity();
  from_host(t.c.backend(), weight, bad);
  ASSERT_TRUE(t.launch(6));
  ASSERT_TRUE(t.launch(7));
  EXPECT_FALSE(t.stepper.read().applied);
  t.stepper.forget();
  EXPECT_FALSE(t.stepper.launched(7));
  EXPECT_NE(t.stepper.trace(6, 6 * 8).find("model.norm.weight"), std::string::npos);
  from_host(t.c.backend(), weight, good);
  expect_same(t.run(9), whole.run(9));
  EXPECT_EQ(t.state(), whole.state());
}

// By the factor of the config, 1e6.
TEST_P(CudaCapturedTraining, SpikesAreFoundByTheDevice) {
  Training t(GetParam(), Way::Captured);
  t.run(4);
  t.mean = {1e-9, 30, 0};
  const State before = t.state();
  ASSERT_TRUE(t.launch(4));
  ASSERT_TRUE(t.launch(5));
  const StepOutcome spike = t.stepper.read();
  EXPECT_TRUE(spike.finite());
  EXPECT_FALSE(spike.applied);
  EXPECT_FALSE(t.stepper.read().applied);
  EXPECT_EQ(t.state(), before);
}

INSTANTIATE_TEST_SUITE_P(
    Models, CudaCapturedTraining,
    ::testing::Values(Case{"dense"}, Case{"dense_fp32", RoutingKind::None, Selection::TopK, "fp32"},
                      Case{"mod", RoutingKind::Mod},
                      Case{"stochastic", RoutingKind::Mod, Selection::Stochastic},
                      Case{"stochastic_fp32", RoutingKind::Mod, Selection::Stochastic, "fp32"},
                      Case{"moe", RoutingKind::Moe}, Case{"mode", RoutingKind::ModeStaged}),
    [](const auto& p) { return std::string(p.param.name); });

}  // namespace
}  // namespace fathom
