// A step from its batches to its update, without a training around it.
#include "train/step.h"

#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "src/config/resolve.h"

namespace fathom {
namespace {

class Steps : public ::testing::Test {
 protected:
  explicit Steps(Selection selection = Selection::TopK)
      : config_(config(selection)),
        c_(make_cpu_backend({}, 1), DType::F32),
        model_(c_, config_.model, config_.routing, true),
        optimizer_(c_, model_.parameters(), config_.train),
        stepper_(c_, model_, optimizer_, config_,
                 [this](std::int64_t first, std::int64_t count) { return batch(first, count); }) {
    model_.initialise(c_, 1);
  }

  static Config config(Selection selection) {
    Config c;
    c.model.vocab_size = 64;
    c.model.width = 16;
    c.model.depth = 4;
    c.model.heads = 2;
    c.model.ffn_hidden = 32;
    c.routing.kind = RoutingKind::Mod;
    c.routing.capacity = 0.25;
    c.routing.selection = selection;
    c.train.seq_len = 16;
    c.train.batch_tokens = 64;
    c.train.micro_batch = 2;
    c.train.steps = 100;
    c.train.precision = "fp32";
    c.train.spike_factor = 1.5;
    return resolve(c);
  }
  HostBatch batch(std::int64_t first, std::int64_t count) const {
    std::vector<std::int32_t> tokens, targets;
    for (std::int64_t i = 0; i < count * 16; ++i) {
      const std::int64_t at = first * 16 + i;
      tokens.push_back(static_cast<std::int32_t>(at * at % 61));
      targets.push_back(static_cast<std::int32_t>((at + 1) * (at + 1) % 61));
    }
    return make_host_batch(count, 16, tokens, targets);
  }

  StepOutcome step(std::int64_t number, double lr, LossMean mean = {}) {
    EXPECT_TRUE(stepper_.launch({number, 4 * number, lr, mean}));
    EXPECT_TRUE(stepper_.launched(number));
    const StepOutcome outcome = stepper_.read();
    EXPECT_FALSE(stepper_.launched(number));
    return outcome;
  }

  // All that an update changes.
  std::vector<std::vector<float>> state() {
    Backend& b = c_.backend();
    return {to_floats(b, model_.parameters().masters()), to_floats(b, optimizer_.state().m),
            to_floats(b, optimizer_.state().v)};
  }

  Config config_;
  Context c_;
  Transformer model_;
  AdamW optimizer_;
  StepRunner stepper_;
};

// The device's verdict and the update that a caller makes of the norms: the same to the bit.
TEST_F(Steps, AnUpdateIsTheOptimizersOwn) {
  config_.train.grad_clip = 0.1;  // the step is told when it runs
  const StepOutcome first = step(0, 1e-2);
  EXPECT_TRUE(first.applied);
  EXPECT_GT(first.norms.model, 0.1);
  const auto updated = state();

  model_.initialise(c_, 1);
  TrainConfig train = config_.train;
  AdamW by_hand(c_, model_.parameters(), train);  // the gradients are still there
  by_hand.update(c_, model_.parameters(), first.norms, 1e-2, 1);
  EXPECT_EQ(to_floats(c_.backend(), model_.parameters().masters()), updated[0]);
  EXPECT_EQ(to_floats(c_.backend(), by_hand.state().m), updated[1]);
  EXPECT_EQ(to_floats(c_.backend(), by_hand.state().v), updated[2]);
}

TEST_F(Steps, OneThatIsNotFiniteChangesNothing) {
  step(0, 1e-3);
  const Tensor& weight = model_.parameters().get("model.norm.weight");
  const std::vector<float> good = to_floats(c_.backend(), weight);
  std::vector<float> bad = good;
  bad[3] = std::numeric_limits<float>::infinity();
  const auto before = state();
  from_host(c_.backend(), weight, bad);
  const StepOutcome broken = step(1, 1e-3);
  EXPECT_FALSE(broken.finite());
  EXPECT_FALSE(broken.applied);
  EXPECT_NE(stepper_.trace(1, 4).find("model.norm.weight"), std::string::npos);
  from_host(c_.backend(), weight, good);
  EXPECT_EQ(state(), before);
  EXPECT_TRUE(step(2, 1e-3).applied);
}

TEST_F(Steps, ATraceChangesNothing) {
  step(0, 1e-3);
  const auto before = state();
  EXPECT_NE(stepper_.trace(1, 4).find("no single op"), std::string::npos);
  EXPECT_EQ(state(), before);
}

TEST_F(Steps, ASpikeIsAppliedOnlyWhereItIsWarnedOf) {
  const LossMean low{1.0, 50, 0};  // the loss is above 4
  const auto before = state();
  EXPECT_FALSE(step(0, 1e-3, low).applied);
  EXPECT_EQ(state(), before);
  config_.train.on_spike = OnSpike::Warn;
  EXPECT_TRUE(step(0, 1e-3, low).applied);
  EXPECT_NE(state(), before);
}

class NoisySteps : public Steps {
 protected:
  NoisySteps() : Steps(Selection::Stochastic) {}

  double loss_by_hand(std::uint64_t number) {
    double loss = 0;
    for (std::int64_t part = 0; part < 2; ++part) {
      const Batch b = upload(c_, batch(4 * static_cast<std::int64_t>(number) + 2 * part, 2));
      const ForwardResult result = model_.forward(c_, b, Stochastic{config_.seed, number, 2 * part, {}});
      loss += model_.objective(c_, b, result, 0.5).cross_entropy / 64;
    }
    return loss;
  }
};

TEST_F(NoisySteps, DrawTheNoiseOfTheirNumber) {
  for (const std::int64_t number : {0, 1, 7, 70000}) {
    EXPECT_EQ(step(number, 0.0).loss, loss_by_hand(static_cast<std::uint64_t>(number))) << number;
  }
}

}  // namespace
}  // namespace fathom
