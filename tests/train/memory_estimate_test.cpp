// The memory that fathom plan predicts, beside the peak of a training step: within a tenth.
#include <memory>

#include <gtest/gtest.h>

#include "src/config/resolve.h"
#include "src/flops/flops.h"
#include "train/optimizer.h"
#include "train/step.h"

namespace fathom {
namespace {

struct Case {
  const char* name;
  RoutingKind kind = RoutingKind::None;
  Recompute recompute = Recompute::None;
  bool qk_norm = false;
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }
};

class MemoryEstimateTest : public ::testing::TestWithParam<Case> {};

// Large enough that a tensor is large beside the rounding of its block.
Config config_of(const Case& of) {
  Config c;
  c.model.vocab_size = 2048;
  c.model.width = 128;
  c.model.depth = 6;
  c.model.heads = 4;
  c.model.ffn_hidden = 384;
  c.model.qk_norm = of.qk_norm;
  c.train.seq_len = 256;
  c.train.batch_tokens = 8 * c.train.seq_len;
  c.train.steps = 1;
  c.train.precision = "fp32";
  c.train.recompute = of.recompute;
  c.routing.kind = of.kind;
  c.routing.experts.count = 4;
  if (of.kind == RoutingKind::Mod || of.kind == RoutingKind::ModeStaged)
    c.routing.causal.method = CausalMethod::Predictor;
  return resolve(c);
}

TEST_P(MemoryEstimateTest, IsWithinATenthOfThePeakOfAStep) {
  const Config config = config_of(GetParam());
  Context c(make_cpu_backend({}, 2), DType::F32);
  Transformer model(c, config.model, config.routing, true);
  model.initialise(c, 1);
  model.set_recompute(config.train.recompute);
  AdamW optimizer(c, model.parameters(), config.train);
  StepRunner stepper(c, model, optimizer, config, [&](std::int64_t, std::int64_t count) {
    const auto rows = static_cast<std::size_t>(count * config.train.seq_len);
    const std::vector<std::int32_t> tokens(rows, 7);
    return make_host_batch(count, config.train.seq_len, tokens, tokens);
  });
  ASSERT_TRUE(stepper.launch({0, 0, 1e-3, {}}));
  EXPECT_TRUE(stepper.read().applied);
  const auto peak = static_cast<double>(c.allocator().use().total_peak);
  const MemoryEstimate estimate = estimate_memory(config, {c.backend().head_chunk_rows(), false});
  EXPECT_NEAR(estimate.total() / peak, 1.0, 0.1)
      << "estimate " << estimate.total() / 1048576 << " MiB, peak " << peak / 1048576 << " MiB";
}

TEST_P(MemoryEstimateTest, OfAnEvaluationOnAGpuIsWithinATenthOfWhatOneTakes) {
  Config config = config_of(GetParam());
  config.data.valid = "valid.h5";
  Context c(make_cpu_backend({}, 2), DType::F32);
  Transformer model(c, config.model, config.routing, true);
  model.initialise(c, 1);
  const std::int64_t sequences = config.micro_batch_sequences();
  const auto rows = static_cast<std::size_t>(sequences * config.train.seq_len);
  const std::vector<std::int32_t> tokens(rows, 7);
  const Batch batch = make_batch(c, sequences, config.train.seq_len, tokens, tokens);
  const NoGrad no_grad(c);
  c.allocator().reset_peak();
  const std::size_t before = c.allocator().use().total_now;
  {
    const ForwardResult pass = model.forward(c, batch, training_rule(config.routing, 1, 0));
    model.cross_entropy(c, pass.hidden, batch.targets, 1.0);
  }
  const auto took = static_cast<double>(c.allocator().use().total_peak - before);
  const MemoryEstimate estimate = estimate_memory(config, {c.backend().head_chunk_rows(), true});
  EXPECT_NEAR(estimate.evaluation / took, 1.0, 0.1)
      << "estimate " << estimate.evaluation / 1048576 << " MiB, taken " << took / 1048576 << " MiB";
}

INSTANTIATE_TEST_SUITE_P(
    Models, MemoryEstimateTest,
    ::testing::Values(Case{"dense"}, Case{.name = "dense_qk_norm", .qk_norm = true},
                      Case{.name = "dense_recompute", .recompute = Recompute::Block},
                      Case{.name = "mod", .kind = RoutingKind::Mod},
                      Case{.name = "mod_recompute", .kind = RoutingKind::Mod, .recompute = Recompute::Block},
                      Case{.name = "moe", .kind = RoutingKind::Moe},
                      Case{.name = "mode_staged", .kind = RoutingKind::ModeStaged}),
    [](const auto& p) { return std::string(p.param.name); });

}  // namespace
}  // namespace fathom
