// The FLOP counter of src/flops against the matrix products that the engine launched, item by item
// (docs/flops.md has the convention).
#include "src/flops/flops.h"

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>

#include <gtest/gtest.h>

#include "src/autograd/tape.h"
#include "src/config/resolve.h"
#include "src/model/transformer.h"

namespace fathom {
namespace {

using Items = std::map<std::string, double>;

struct Case {
  std::string name;
  std::function<void(Config&)> change;
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }
};

Config config_of(const Case& of) {
  Config c;
  c.model.vocab_size = 37;
  c.model.width = 24;
  c.model.depth = 5;
  c.model.heads = 4;
  c.model.ffn_hidden = 40;
  c.train.seq_len = 29;
  c.train.batch_tokens = 4 * 29;
  c.train.micro_batch = 2;
  c.train.steps = 1;
  of.change(c);
  return resolve(c);
}

void routed(Config& c, CausalMethod method) {
  c.routing.kind = RoutingKind::Mod;
  c.routing.capacity = 0.3;  // 8 of 29
  c.routing.causal.method = method;
}

/// The terms that are not zero, of `tokens` tokens.
Items items_of(const FlopTerms& f, double tokens) {
  Items items;
  for (const auto& [name, flops] : {std::pair{"attention_proj", f.attention_proj},
                                    {"attention_scores", f.attention_scores},
                                    {"mlp", f.mlp},
                                    {"experts", f.experts},
                                    {"router", f.router},
                                    {"predictor", f.predictor},
                                    {"head", f.head}}) {
    if (flops > 0) items[name] = flops * tokens;
  }
  return items;
}

class Launched : public ::testing::TestWithParam<Case> {
 protected:
  Launched()
      : config_(config_of(GetParam())),
        c_(make_cpu_backend({}, 2), DType::F32),
        model_(c_, config_.model, config_.routing, true) {
    model_.initialise(c_, 3);
    c_.backend().flop_log.enabled = true;
  }

  Batch batch(std::int64_t sequences) {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(sequences * config_.train.seq_len));
    for (std::size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<std::int32_t>(i * i % 37);
    return make_batch(c_, sequences, config_.train.seq_len, tokens, tokens);
  }

  /// Nothing else was launched, and every item is equal to rounding of a sum of whole numbers.
  void expect_items(const Items& expected) {
    const Items& got = c_.backend().flop_log.items();
    for (const auto& [name, flops] : got) {
      EXPECT_TRUE(expected.contains(name)) << name << ": " << flops << " launched, not counted";
    }
    for (const auto& [name, flops] : expected) {
      ASSERT_TRUE(got.contains(name)) << name << " was not launched";
      EXPECT_NEAR(got.at(name), flops, 1e-12 * flops) << name;
    }
  }

  /// One micro-batch forward and backward.
  void train(const Batch& b) {
    Tape tape(c_);
    c_.set_tape(&tape);
    const ForwardResult result = model_.forward(c_, b, training_rule(config_.routing, 1, 0));
    model_.objective(c_, b, result, 1.0);
    c_.set_tape(nullptr);
    tape.backward();
  }

  Config config_;
  Context c_;
  Transformer model_;
};

TEST_P(Launched, ForwardIsWhatIsCounted) {
  const Batch b = batch(3);
  c_.backend().flop_log.clear();
  const ForwardResult result = model_.forward(c_, b, training_rule(config_.routing, 1, 0));
  model_.logits(c_, result.hidden);
  expect_items(items_of(forward_flops_per_token(config_), 3.0 * 29));
}

TEST_P(Launched, TrainingStepIsWhatIsCounted) {
  const Batch b = batch(2);
  c_.backend().flop_log.clear();
  train(b);
  train(b);  // two micro-batches are a step
  expect_items(items_of(train_flops_per_token(config_), 4.0 * 29));
  EXPECT_NEAR(c_.backend().flop_log.total(), train_flops_per_step(config_),
              1e-12 * train_flops_per_step(config_));
}

// More rows than the head holds logits of at a time, the last chunk a short one.
TEST_P(Launched, TheHeadInChunks) {
  const std::int64_t sequences = 512 / 29 * 2 + 3;
  const Batch b = batch(sequences);
  c_.backend().flop_log.clear();
  train(b);
  expect_items(items_of(train_flops_per_token(config_), static_cast<double>(sequences * 29)));
}

// Recomputation runs the blocks once more; the counter does not say so, on purpose. Only the blocks' items
// grow.
TEST_P(Launched, RecomputationLaunchesOneMoreForwardOfTheBlocks) {
  model_.set_recompute(Recompute::Block);
  const Batch b = batch(4);
  c_.backend().flop_log.clear();
  train(b);
  Items expected = items_of(train_flops_per_token(config_), 4.0 * 29);
  const Items forward = items_of(forward_flops_per_token(config_), 4.0 * 29);
  for (const char* item : {"attention_proj", "attention_scores", "mlp", "experts"}) {
    if (forward.contains(item)) expected[item] += forward.at(item);
  }
  if (config_.routing.has_experts()) {  // the experts' routers are of the block, those of the depth before it
    const auto tokens = 4.0 * 29 * static_cast<double>(model_.routed_layers().size());
    const auto hidden = static_cast<double>(config_.routing.causal.predictor_hidden);
    expected["router"] += forward.at("router") - tokens * 2 * 24;
    if (config_.routing.experts_choose() && forward.contains("predictor"))
      expected["predictor"] += forward.at("predictor") - tokens * 2 * hidden * (24 + 1);
  }
  expect_items(expected);
}

class Served : public Launched {};

TEST_P(Served, CausalEvaluationIsCountedFromTheRealisedCapacity) {
  constexpr std::int64_t kSequences = 4;
  const double tokens = kSequences * 29.0;
  const Batch b = batch(kSequences);
  c_.backend().flop_log.clear();
  const ForwardResult result = model_.forward(c_, b, causal_rule(config_.routing));
  model_.logits(c_, result.hidden);
  std::vector<double> capacity(static_cast<std::size_t>(config_.model.depth), 1.0);
  std::vector<double> expert_rows(capacity.size(), 0.0);
  for (const ExpertLayer& e : result.experts) {
    const ExpertShape& s = e.dispatch.shape;  // each expert computes as many rows as the busiest has
    expert_rows[static_cast<std::size_t>(e.layer)] =
        static_cast<double>(s.experts * s.slots) / static_cast<double>(s.rows);
    EXPECT_EQ(*std::max_element(e.dispatch.taken.begin(), e.dispatch.taken.end()), s.slots);
    EXPECT_LT(s.slots, s.rows);
  }
  const double head_flops =
      4.0 * static_cast<double>(config_.model.width);  // of a pair: H d = D, two products
  double pairs = 0;
  for (std::int64_t layer = 0; layer < config_.model.depth; ++layer) {
    if (!config_.routing.routes(layer)) pairs += kSequences * 29.0 * 29.0 / 2;
  }
  for (const RoutedLayer& routed : result.routing) {
    std::vector<double> kept(kSequences, 0.0);  // of each sequence: they differ
    for (std::int32_t i : to_host<std::int32_t>(c_.backend(), routed.indices))
      kept[static_cast<std::size_t>(i / 29)] += 1;
    for (double k : kept) pairs += k * k / 2;
    capacity[static_cast<std::size_t>(routed.layer)] =
        std::accumulate(kept.begin(), kept.end(), 0.0) / tokens;
    EXPECT_GT(capacity[static_cast<std::size_t>(routed.layer)], 0.05);
    EXPECT_LT(capacity[static_cast<std::size_t>(routed.layer)], 0.95);
  }
  Items expected = items_of(causal_flops_per_token(config_, capacity, expert_rows), tokens);
  // The counter knows the mean capacity; the mean of squares is larger, so attention is counted low.
  EXPECT_LE(expected.at("attention_scores"), pairs * head_flops * (1 + 1e-12));
  EXPECT_GT(expected.at("attention_scores"), 0.8 * pairs * head_flops);
  expected["attention_scores"] = pairs * head_flops;
  expect_items(expected);
}

std::vector<Case> dense_cases() {
  return {{"dense", [](Config&) {}},
          {"dense_gqa", [](Config& c) { c.model.kv_heads = 2; }},
          {"dense_tied", [](Config& c) { c.model.tie_embeddings = true; }},
          {"dense_qk_norm", [](Config& c) { c.model.qk_norm = true; }}};
}

std::vector<Case> uncausal_cases() {
  return {{"mod_none", [](Config& c) { routed(c, CausalMethod::None); }}, {"mod_stochastic", [](Config& c) {
                                                                             routed(c, CausalMethod::None);
                                                                             c.routing.selection =
                                                                                 Selection::Stochastic;
                                                                           }}};
}

std::vector<Case> causal_cases() {
  return {{"mod_aux", [](Config& c) { routed(c, CausalMethod::Aux); }},
          {"mod_predictor", [](Config& c) { routed(c, CausalMethod::Predictor); }},
          {"mod_both_tied_gqa",
           [](Config& c) {
             routed(c, CausalMethod::Both);
             c.model.tie_embeddings = true;
             c.model.kv_heads = 1;
           }},
          {"mod_every_block",
           [](Config& c) {
             routed(c, CausalMethod::Aux);
             c.routing.first = 0;
             c.routing.every = 1;
           }},
          {"mod_one_token", [](Config& c) {
             routed(c, CausalMethod::Predictor);
             c.routing.capacity = 0.001;
           }}};
}

void experts(Config& c, RoutingKind kind, double capacity_factor) {
  c.routing.kind = kind;
  c.routing.experts = {.count = 3, .capacity_factor = capacity_factor};
}

std::vector<Case> expert_cases() {
  return {{"moe", [](Config& c) { experts(c, RoutingKind::Moe, 1.0); }},  // 9 of 29 tokens each
          {"moe_all", [](Config& c) { experts(c, RoutingKind::Moe, 3.0); }},
          {"moe_one_token", [](Config& c) { experts(c, RoutingKind::Moe, 0.01); }},
          {"mode_integrated",
           [](Config& c) {
             experts(c, RoutingKind::ModeIntegrated, 0.7);
             c.routing.experts.noop = 4;
           }},
          {"moe_predictor",
           [](Config& c) {
             experts(c, RoutingKind::Moe, 1.0);
             c.routing.causal.method = CausalMethod::Both;
           }},
          {"mode_staged_predictor",
           [](Config& c) {
             routed(c, CausalMethod::Predictor);
             experts(c, RoutingKind::ModeStaged, 1.0);
           }},
          {"mode_staged", [](Config& c) {
             routed(c, CausalMethod::Both);
             experts(c, RoutingKind::ModeStaged, 1.0);  // 2 of 8 kept tokens each
             c.model.tie_embeddings = true;
           }}};
}

std::vector<Case> token_cases() {
  const auto tokens = [](Config& c, RoutingKind kind, std::int64_t top_k, double capacity_factor) {
    experts(c, kind, capacity_factor);
    c.routing.experts.choice = ExpertsChoose::Token;
    c.routing.experts.top_k = top_k;
  };
  return {{"token_top1", [=](Config& c) { tokens(c, RoutingKind::Moe, 1, 1.0); }},
          {"token_dropless", [=](Config& c) { tokens(c, RoutingKind::Moe, 2, 0.0); }},
          {"token_staged", [=](Config& c) {
             routed(c, CausalMethod::Predictor);
             tokens(c, RoutingKind::ModeStaged, 2, 1.0);
           }}};
}

constexpr auto kName = [](const auto& p) { return p.param.name; };
INSTANTIATE_TEST_SUITE_P(Dense, Launched, ::testing::ValuesIn(dense_cases()), kName);
INSTANTIATE_TEST_SUITE_P(Uncausal, Launched, ::testing::ValuesIn(uncausal_cases()), kName);
INSTANTIATE_TEST_SUITE_P(Tokens, Launched, ::testing::ValuesIn(token_cases()), kName);
INSTANTIATE_TEST_SUITE_P(Experts, Launched, ::testing::ValuesIn(expert_cases()), kName);
INSTANTIATE_TEST_SUITE_P(Causal, Launched, ::testing::ValuesIn(causal_cases()), kName);
INSTANTIATE_TEST_SUITE_P(Causal, Served, ::testing::ValuesIn(causal_cases()), kName);
INSTANTIATE_TEST_SUITE_P(Experts, Served, ::testing::ValuesIn(expert_cases()), kName);
INSTANTIATE_TEST_SUITE_P(Tokens, Served, ::testing::ValuesIn(token_cases()), kName);

// Documents see less than the half that is counted.
TEST(LaunchedWithDocuments, AttentionCountsTheirOwnPairsOnly) {
  Context c(make_cpu_backend({}, 1), DType::F32);
  const Case plain{"", [](Config&) {}};
  const Config config = config_of(plain);
  Transformer model(c, config.model, config.routing, false);
  model.initialise(c, 3);
  std::vector<std::int32_t> documents(29, 0);
  for (std::size_t i = 10; i < 29; ++i) documents[i] = 1;
  const Batch b = make_batch(c, 1, 29, std::vector<std::int32_t>(29, 1), {}, documents);
  c.backend().flop_log.enabled = true;
  model.forward(c, b, TopK{});
  EXPECT_DOUBLE_EQ(c.backend().flop_log.items().at("attention_scores"),
                   5 * 4.0 * 24 * (10 * 10 + 19 * 19) / 2);
}

}  // namespace
}  // namespace fathom
