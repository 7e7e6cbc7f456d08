// The FLOP counter against values worked out by hand and against the closed form of the PyTorch peer.
#include "src/flops/flops.h"

#include <fstream>
#include <sstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/error.h"
#include "src/config/parse.h"
#include "src/config/resolve.h"
#include "src/core/units.h"

namespace fathom {
namespace {

// Small enough to count on paper: D 8, H 2 of 4, G 1, F 12, V 10, two blocks, T 8.
Config tiny() {
  Config c;
  c.model.vocab_size = 10;
  c.model.width = 8;
  c.model.depth = 2;
  c.model.heads = 2;
  c.model.kv_heads = 1;
  c.model.ffn_hidden = 12;
  c.train.seq_len = 8;
  c.train.batch_tokens = 32;
  c.train.steps = 5;
  return resolve(c);
}

Config tiny_mod(CausalMethod method) {
  Config c = tiny();
  c.routing.kind = RoutingKind::Mod;
  c.routing.capacity = 0.25;  // K = 2 of 8
  c.routing.causal.method = method;
  c.routing.causal.predictor_hidden = 3;
  return c;
}

TEST(KeptTokens, FloorsAndKeepsAtLeastOne) {
  EXPECT_EQ(kept_tokens(0.125, 256), 32);
  EXPECT_EQ(kept_tokens(0.125, 255), 31);
  EXPECT_EQ(kept_tokens(0.125, 7), 1);
  EXPECT_EQ(kept_tokens(1e-9, 1), 1);
  EXPECT_EQ(kept_tokens(1.0, 100), 100);
}

TEST(ExpertTokens, FloorsAndKeepsAtLeastOneAndAtMostAll) {
  EXPECT_EQ(expert_tokens({.count = 8, .capacity_factor = 1.0}, 256), 32);
  EXPECT_EQ(expert_tokens({.count = 4, .capacity_factor = 0.7}, 20), 3);  // 3.5
  EXPECT_EQ(expert_tokens({.count = 8, .capacity_factor = 1.0}, 7), 1);
  EXPECT_EQ(expert_tokens({.count = 1, .capacity_factor = 1.0}, 20), 20);
  EXPECT_EQ(expert_tokens({.count = 2, .capacity_factor = 100.0}, 20), 20);
  const ExpertsConfig token{.count = 8, .choice = ExpertsChoose::Token, .capacity_factor = 1.25, .top_k = 2};
  EXPECT_EQ(expert_tokens(token, 256), 80);
  EXPECT_EQ(expert_tokens({.count = 8, .choice = ExpertsChoose::Token, .capacity_factor = 0}, 256), 256);
}

Config tiny_experts(RoutingKind kind, std::int64_t noop) {
  Config c = tiny_mod(CausalMethod::None);
  c.routing.kind = kind;
  c.routing.experts = {.count = 3, .capacity_factor = 0.75, .noop = noop};
  return c;
}

// 0.75 * 8 / 3 = 2 tokens each: 6 rows of 8 tokens, of 288 multiply-adds each; a router of 3 choices, and 2
// no-ops.
TEST(Flops, ExpertsByHand) {
  const FlopTerms f = forward_flops_per_token(tiny_experts(RoutingKind::Moe, 0));
  EXPECT_EQ(f.mlp, 0);
  EXPECT_EQ(f.experts, 2 * 2 * 288 * 0.75);
  EXPECT_EQ(f.router, 2 * 2 * 8 * 3);
  const Config integrated = tiny_experts(RoutingKind::ModeIntegrated, 2);
  EXPECT_EQ(forward_flops_per_token(integrated).experts, 2 * 2 * 288 * 0.75);
  EXPECT_EQ(forward_flops_per_token(integrated).router, 2 * 2 * 8 * 5);
  EXPECT_EQ(train_flops_per_token(integrated).experts, 3 * 2 * 2 * 288 * 0.75);
  EXPECT_EQ(train_flops_per_token(integrated).router, 3 * 2 * 2 * 8 * 5);
}

// The second block keeps 2 of 8 tokens; floor(0.75 * 2 / 3) = 0, so each of its experts takes one of them.
TEST(Flops, StagedByHand) {
  const FlopTerms f = forward_flops_per_token(tiny_experts(RoutingKind::ModeStaged, 0));
  EXPECT_EQ(f.experts, 2 * 288 * (0.75 + 3.0 / 8));
  EXPECT_EQ(f.router, 2 * 8 + 2 * 8 * 3 * (1 + 0.25));
  EXPECT_EQ(f.attention_proj, 2 * 192 * 1.25);
}

TEST(Parameters, ExpertsByHand) {
  // A block: 192 of attention, two norms of 8, a router of 3 x 8, three MLPs of 288.
  const ParameterCount moe = count_parameters(tiny_experts(RoutingKind::Moe, 0));
  EXPECT_EQ(moe.total, 80 + 80 + 8 + 2 * (192 + 16 + 24 + 3 * 288));
  EXPECT_EQ(moe.active, 80 + 80 + 8 + 2 * (192 + 16 + 24 + 288 * 0.75));
  const ParameterCount integrated = count_parameters(tiny_experts(RoutingKind::ModeIntegrated, 2));
  EXPECT_EQ(integrated.total, moe.total + 2 * 2 * 8);
  const ParameterCount staged = count_parameters(tiny_experts(RoutingKind::ModeStaged, 0));
  EXPECT_EQ(staged.total, moe.total + 8);
  EXPECT_EQ(staged.active, 80 + 80 + 8 + 8 + (192 + 16 + 24) * 1.25 + 288 * (0.75 + 3.0 / 8));
}

// A predictor of what experts choose: 8 -> P, its biases, P -> 3, their biases; its first layer's input has
// no gradient.
TEST(Parameters, PredictorsOfExpertsByHand) {
  const Config plain = tiny_experts(RoutingKind::Moe, 0);
  Config predicted = plain;
  predicted.routing.causal.method = CausalMethod::Predictor;
  const std::int64_t p = predicted.routing.causal.predictor_hidden;
  EXPECT_EQ(count_parameters(predicted).total, count_parameters(plain).total + 2 * (8 * p + p + 3 * p + 3));
  EXPECT_EQ(forward_flops_per_token(predicted).predictor, static_cast<double>(2 * 2 * (8 * p + 3 * p)));
  EXPECT_EQ(train_flops_per_token(predicted).predictor,
            static_cast<double>(3 * 2 * 2 * (8 * p + 3 * p) - 2 * 2 * 8 * p));
}

TEST(Flops, DenseByHand) {
  const FlopTerms f = forward_flops_per_token(tiny());
  // A block: q 8x8, k and v 8x4, o 8x8: 192 multiply-adds.
  EXPECT_EQ(f.attention_proj, 2 * 2 * 192);
  // 2 products of 8 elements with T / 2 = 4 tokens: 64 multiply-adds.
  EXPECT_EQ(f.attention_scores, 2 * 2 * 64);
  EXPECT_EQ(f.mlp, 2 * 2 * 3 * 8 * 12);
  EXPECT_EQ(f.router, 0);
  EXPECT_EQ(f.predictor, 0);
  EXPECT_EQ(f.head, 2 * 80);
  EXPECT_EQ(f.total(), 768 + 256 + 1152 + 160);
  EXPECT_EQ(train_flops_per_token(tiny()).total(), 3 * 2336);
  EXPECT_EQ(train_flops_per_step(tiny()), 32 * 3 * 2336);
}

TEST(Flops, RoutedByHand) {
  const FlopTerms f = forward_flops_per_token(tiny_mod(CausalMethod::Predictor));
  // Block 0 is dense, block 1 computes 2 of 8 tokens: a quarter of the products, a sixteenth of the scores.
  EXPECT_EQ(f.attention_proj, 2 * 192 * 1.25);
  EXPECT_EQ(f.attention_scores, 2 * 64 * (1 + 1.0 / 16));
  EXPECT_EQ(f.mlp, 2 * 288 * 1.25);
  EXPECT_EQ(f.router, 2 * 8);
  EXPECT_EQ(f.predictor, 2 * (8 * 3 + 3));
  EXPECT_EQ(f.head, 160);
  const FlopTerms t = train_flops_per_token(tiny_mod(CausalMethod::Predictor));
  EXPECT_EQ(t.router, 48);
  // First layer: forward and weight gradient; second layer: forward, weight and input gradient.
  EXPECT_EQ(t.predictor, 2 * (2 * 24) + 3 * (2 * 3));
  EXPECT_EQ(t.mlp, 3 * f.mlp);
  EXPECT_EQ(forward_flops_per_token(tiny_mod(CausalMethod::Aux)).predictor, 0);
  EXPECT_EQ(forward_flops_per_token(tiny_mod(CausalMethod::Both)).predictor, f.predictor);
}

// torch_lm.py's flops_per_token: f of the linear layers and f^2 of the scores, no router, no predictor.
double peer_flops_per_token(const Config& c) {
  const double T = static_cast<double>(c.train.seq_len), D = static_cast<double>(c.model.width);
  const double H = static_cast<double>(c.model.heads), G = static_cast<double>(c.model.kv_heads);
  const double dh = static_cast<double>(c.model.head_dim());
  const double linear = 2 * D * (H + 2 * G) * dh + 2 * D * H * dh;
  const double mlp = 6 * D * static_cast<double>(c.model.ffn_hidden);
  double total = 0;
  for (std::int64_t l = 0; l < c.model.depth; ++l) {
    const double f = c.routing.kind == RoutingKind::Mod && (l + 1) % 2 == 0 ? c.routing.capacity : 1.0;
    total += f * (linear + mlp) + f * f * (2 * T * H * dh);
  }
  return 3 * (total + 2 * D * static_cast<double>(c.model.vocab_size));
}

TEST(Flops, AgreesWithThePeersClosedForm) {
  for (const RoutingKind kind : {RoutingKind::None, RoutingKind::Mod}) {
    for (const std::int64_t width : {128, 256, 384}) {
      Config c;
      c.model = {
          .vocab_size = 4096, .width = width, .depth = 6, .heads = 4, .kv_heads = 2, .ffn_hidden = 704};
      c.routing.kind = kind;
      c.routing.capacity = 0.125;
      c = resolve(c);
      const FlopTerms f = train_flops_per_token(c);
      EXPECT_EQ(f.total() - f.router - f.predictor, peer_flops_per_token(c));
    }
  }
}

TEST(Flops, TheWorkedExampleOfTheDocumentation) {
  std::ifstream file(FATHOM_SOURCE_DIR "/docs/flops.md");
  std::stringstream text;
  text << file.rdbuf();
  const auto load = [](const char* name) {
    return resolve(load_config(std::string(FATHOM_SOURCE_DIR "/configs/") + name), 4096);
  };
  const Config dense = load("quickstart-dense.yaml"), mod = load("quickstart-mod.yaml");
  const FlopTerms a = forward_flops_per_token(dense), b = forward_flops_per_token(mod);
  const auto expect_row = [&](const std::string& name, double x, double y) {
    const auto commas = [](double v) { return with_commas(static_cast<std::int64_t>(v)); };
    EXPECT_THAT(text.str(), ::testing::HasSubstr("| " + name + " | " + commas(x) + " | " + commas(y) + " |"));
  };
  expect_row("attention_proj", a.attention_proj, b.attention_proj);
  expect_row("attention_scores", a.attention_scores, b.attention_scores);
  expect_row("mlp", a.mlp, b.mlp);
  expect_row("router", a.router, b.router);
  expect_row("head", a.head, b.head);
  expect_row("forward", a.total(), b.total());
  expect_row("training", train_flops_per_token(dense).total(), train_flops_per_token(mod).total());
}

TEST(Flops, CausalEvaluationCountsTheRealisedCapacity) {
  const Config dense = tiny(), mod = tiny_mod(CausalMethod::Aux);
  const double unused = 0.5;
  EXPECT_EQ(causal_flops_per_token(dense, std::vector{unused, unused}).total(),
            forward_flops_per_token(dense).total());
  EXPECT_EQ(causal_flops_per_token(mod, std::vector{unused, 0.25}).total(),
            forward_flops_per_token(mod).total());
  EXPECT_EQ(causal_flops_per_token(mod, std::vector{1.0, 0.5}).mlp, 2 * 288 * 1.5);
  EXPECT_EQ(causal_flops_per_token(mod, std::vector{1.0, 0.5}).attention_scores, 2 * 64 * 1.25);
  EXPECT_EQ(causal_flops_per_token(mod, std::vector{1.0, 0.0}).mlp, 2 * 288);
  EXPECT_THROW(causal_flops_per_token(mod, std::vector{1.0}), InternalError);
}

TEST(Parameters, ByHand) {
  // A block: 192 + 288 + two norms of 8; embedding and head 80 each; the last norm 8.
  EXPECT_EQ(count_parameters(tiny()).total, 80 + 80 + 8 + 2 * 496);
  EXPECT_EQ(count_parameters(tiny()).active, count_parameters(tiny()).total);
  Config tied = tiny();
  tied.model.tie_embeddings = true;
  tied.model.qk_norm = true;
  EXPECT_EQ(count_parameters(tied).total, 80 + 8 + 2 * (496 + 8));
  EXPECT_EQ(count_parameters(tied).embedding, 0);
  const ParameterCount n = count_parameters(tiny_mod(CausalMethod::Predictor));
  EXPECT_EQ(n.total, 80 + 80 + 8 + 2 * 496 + 8 + (24 + 3 + 3 + 1));
  EXPECT_EQ(n.active, n.total - 496 * 3 / 4);
}

TEST(Parameters, SixNLeavesTheEmbeddingTableOut) {
  EXPECT_EQ(six_n_flops_per_token(tiny()), 6.0 * (80 + 8 + 2 * 496));
}

TEST(HorizonOf, StepsTokensAndFlops) {
  Config c = tiny();
  const double step = train_flops_per_step(c);
  EXPECT_EQ(plan_horizon(c).steps, 5);
  EXPECT_EQ(plan_horizon(c).tokens, 160);
  EXPECT_EQ(plan_horizon(c).flops, 5 * step);

  c.train.steps.reset();
  c.train.tokens = 79;  // 2.47 steps
  EXPECT_EQ(plan_horizon(c).steps, 2);
  c.train.tokens = 1;
  EXPECT_EQ(plan_horizon(c).steps, 1);

  c.train.tokens.reset();
  c.train.target_flops = 7.4 * step;
  EXPECT_EQ(plan_horizon(c).steps, 7);
  EXPECT_EQ(plan_horizon(c).flops, 7 * step);
  c.train.target_flops = 7.6 * step;
  EXPECT_EQ(plan_horizon(c).steps, 8);
  c.train.target_flops = 1;
  EXPECT_EQ(plan_horizon(c).steps, 1);
  c.train.target_flops = 1e29;
  EXPECT_THROW(plan_horizon(c), UsageError);
}

TEST(Flops, AnUnresolvedConfigIsABug) {
  Config c;
  c.train.steps = 1;
  EXPECT_THROW(forward_flops_per_token(c), InternalError);
}

TEST(Memory, GrowsWithTheMicroBatchAndShrinksWithRecomputation) {
  Config c = tiny();
  const MemoryEstimate all = estimate_memory(c);
  EXPECT_EQ(all.parameters, 4.0 * 1160);
  EXPECT_EQ(all.optimizer, 2 * all.parameters);
  EXPECT_EQ(all.logits_chunk, 4.0 * 32 * 10);
  c.train.micro_batch = 1;
  EXPECT_LT(estimate_memory(c).activations, all.activations / 3);
  c.model.depth = 8;
  const double deep = estimate_memory(c).activations;
  c.train.recompute = Recompute::Block;
  EXPECT_LT(estimate_memory(c).activations, deep / 2);
}

// A shape of bench/compare_train.py.
Config measured(std::int64_t width, std::int64_t depth, std::int64_t heads, std::int64_t hidden,
                std::int64_t batch) {
  Config c;
  c.model.vocab_size = 32768;
  c.model.width = width;
  c.model.depth = depth;
  c.model.heads = heads;
  c.model.ffn_hidden = hidden;
  c.train.seq_len = 2048;
  c.train.batch_tokens = batch * c.train.seq_len;
  c.train.steps = 1;
  c.train.precision = "bf16";
  return resolve(c);
}

// docs/results/gpu-speed.md: what ops took beside tensors, and both together.
TEST(Memory, OfAGpuIsWhatWasMeasured) {
  constexpr double kGib = 1 << 30;
  const MemoryEstimate d12 = estimate_memory(measured(768, 12, 12, 2048, 32));
  const MemoryEstimate d24 = estimate_memory(measured(1024, 24, 16, 2816, 16));
  const MemoryEstimate d1b = estimate_memory(measured(2048, 20, 16, 5632, 8));
  EXPECT_NEAR(d12.workspace, 0.57 * kGib, 0.01 * kGib);
  EXPECT_NEAR(d24.workspace, 0.41 * kGib, 0.01 * kGib);
  EXPECT_NEAR(d1b.workspace, 0.41 * kGib, 0.01 * kGib);
  EXPECT_NEAR(d12.steps() / (16.67 * kGib), 1, 0.03);
  EXPECT_NEAR(d24.steps() / (25.15 * kGib), 1, 0.03);
  EXPECT_NEAR(d1b.steps() / (35.74 * kGib), 1, 0.03);
}

TEST(Memory, OnlyAGpusCountsWorkspacesAndAnEvaluation) {
  Config c = measured(768, 12, 12, 2048, 32);
  EXPECT_EQ(estimate_memory(c).evaluation, 0) << "nothing is evaluated";
  c.data.valid = "valid.h5";
  const MemoryEstimate gpu = estimate_memory(c), cpu = estimate_memory(c, {512, false});
  EXPECT_GT(gpu.evaluation, 0);
  EXPECT_EQ(gpu.total(), gpu.steps() + gpu.evaluation);
  EXPECT_EQ(cpu.workspace + cpu.evaluation, 0);
  c.deterministic = true;  // scores of 2 bytes, of so many sequences as 512 MiB hold
  EXPECT_GT(estimate_memory(c).workspace, gpu.workspace + (512 << 20));
  c.train.precision = "fp32";  // cuDNN has no part in it
  EXPECT_LT(estimate_memory(c, {8192, true}).workspace, gpu.workspace);
}

}  // namespace
}  // namespace fathom
