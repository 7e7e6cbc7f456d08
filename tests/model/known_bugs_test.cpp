// The bugs that other implementations of Mixture-of-Depths had, one test each, named after it. Every expected
// value comes from reference_model.h. mutations/ holds a patch a bug that puts it into the engine, and
// mutations.sh checks that the test of that name then fails.
#include <algorithm>
#include <cmath>
#include <random>

#include <gtest/gtest.h>

#include "infer/generate.h"
#include "src/autograd/tape.h"
#include "src/model/transformer.h"
#include "tests/model/reference_model.h"
#include "tests/relative_difference.h"

namespace fathom::known_bugs {
namespace {

using testing_support::relative_difference;

constexpr double kTolerance = 1e-11;  // in double, relative to the largest element
constexpr std::int64_t kBatch = 3;
constexpr std::int64_t kSeq = 12;

ModelConfig model_config() {
  ModelConfig m;
  m.vocab_size = 19;
  m.width = 12;
  m.depth = 4;
  m.heads = 2;
  m.kv_heads = 1;
  m.ffn_hidden = 10;
  m.max_seq_len = kSeq;
  return m;
}

/// Blocks 1 and 3 are routed and keep 4 of 12 tokens.
RoutingConfig routing_config(CausalMethod method, Gate gate = Gate::Raw) {
  RoutingConfig r;
  r.kind = RoutingKind::Mod;
  r.capacity = 0.4;
  r.gate = gate;
  r.causal.method = method;
  r.causal.aux_weight = 0.3;
  r.causal.predictor_hidden = 5;
  return r;
}

/// The engine's model, and the reference with the same parameters.
class Pair {
 public:
  explicit Pair(const RoutingConfig& routing, const ModelConfig& model = model_config())
      : c(make_cpu_backend({}, 2), DType::F64),
        engine(c, model, routing, true),
        reference(model, routing, {}) {
    std::mt19937_64 generator(17);
    std::normal_distribution<double> normal;
    for (const ParameterSpec& spec : engine.parameters().specs()) {
      const bool norm = spec.name.find("norm") != std::string::npos;
      const double stddev = norm ? 0.2 : 1.0 / std::sqrt(static_cast<double>(spec.shape[-1]));
      Values values(static_cast<std::size_t>(spec.shape.size()));
      for (double& x : values) x = (norm ? 1.0 : 0.0) + stddev * normal(generator);
      set(spec.name, values);
    }
  }

  void set(const std::string& name, const Values& values) {
    from_doubles(c.backend(), engine.parameters().get(name), values);
    reference.parameters()[name] = values;
  }

  Batch batch(const Sequences& s) { return make_batch(c, s.batch, s.seq, s.tokens, s.targets, s.documents); }
  Values host(const Tensor& t) { return to_doubles(c.backend(), t); }
  std::vector<std::int32_t> rows(const RoutedLayer& routed) {
    return to_host<std::int32_t>(c.backend(), routed.indices);
  }

  /// Every row that was kept, the stream after every block and the logits, against the reference.
  void expect_equal(const Sequences& in, const SelectionRule& rule, const Choice& choice) {
    const ReferenceResult expected = reference.run(in, choice);
    std::size_t blocks = 0;
    const ForwardResult got = engine.forward(c, batch(in), rule, [&](std::int64_t after, const Tensor& x) {
      const auto i = static_cast<std::size_t>(after);
      EXPECT_LT(relative_difference(host(x), expected.streams.at(i)), kTolerance)
          << "the stream after " << after << " blocks";
      ++blocks;
    });
    EXPECT_EQ(blocks, expected.streams.size());
    ASSERT_EQ(got.routing.size(), expected.routed.size());
    for (const RoutedLayer& routed : got.routing) {
      EXPECT_EQ(rows(routed), expected.routed.at(routed.layer).rows()) << "block " << routed.layer;
    }
    EXPECT_LT(relative_difference(host(engine.logits(c, got.hidden)), expected.logits), kTolerance);
  }

  LossSums backward(const Sequences& in) {
    Tape tape(c);
    c.set_tape(&tape);
    const Batch b = batch(in);
    const ForwardResult result = engine.forward(c, b, TopK{});
    const LossSums sums = engine.objective(c, b, result, 1.0);
    c.set_tape(nullptr);
    tape.backward();
    return sums;
  }
  Values gradient(const std::string& name) { return host(engine.parameters().get(name).bound_gradient()); }

  Context c;
  Transformer engine;
  ReferenceModel reference;
};

Sequences random_sequences(std::int64_t batch = kBatch, std::int64_t seq = kSeq, unsigned seed = 5) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<std::int32_t> any(0,
                                                  static_cast<std::int32_t>(model_config().vocab_size) - 1);
  Sequences s{batch, seq, {}, {}, {}};
  for (std::int64_t i = 0; i < batch * seq; ++i) {
    s.tokens.push_back(any(generator));
    s.targets.push_back(any(generator));
  }
  return s;
}

std::string router(std::int64_t layer) { return "model.layers." + std::to_string(layer) + ".router.weight"; }

const Choice kTopK{Choice::By::TopK};
constexpr double kThreshold = 0.45;
const Choice kByRouter{Choice::By::Router, kThreshold};
const Choice kByPredictor{Choice::By::Predictor, kThreshold};
const Causal kCausalRouter{Causal::Logit::Router, kThreshold};
const Causal kCausalPredictor{Causal::Logit::Predictor, kThreshold};

// Fails when top-k keeps what is above the K-th largest score.
TEST(KnownBugs, OneTokenTooFewByGreaterThanAtTheThreshold) {
  const Sequences in = random_sequences();
  for (const double capacity : {0.01, 0.1, 0.25, 0.4, 0.5, 0.9, 1.0}) {
    RoutingConfig routing = routing_config(CausalMethod::Aux);
    routing.capacity = capacity;
    Pair p(routing);
    const auto keep = static_cast<std::size_t>(std::max(1.0, std::floor(capacity * kSeq)));
    const ForwardResult got = p.engine.forward(p.c, p.batch(in), TopK{});
    for (const RoutedLayer& routed : got.routing) {
      EXPECT_EQ(routed.indices.size(), static_cast<std::int64_t>(kBatch * keep));
    }
    p.expect_equal(in, TopK{}, kTopK);
  }
  // Equal scores: still K of each sequence, the first ones.
  Pair p(routing_config(CausalMethod::Aux));
  for (std::int64_t layer : {1, 3}) p.set(router(layer), Values(12, 0.0));
  for (const RoutedLayer& routed : p.engine.forward(p.c, p.batch(in), TopK{}).routing) {
    EXPECT_EQ(p.rows(routed), (std::vector<std::int32_t>{0, 1, 2, 3, 12, 13, 14, 15, 24, 25, 26, 27}));
  }
}

void expect_every_gate_equal() {
  for (const Gate gate : {Gate::Raw, Gate::Sigmoid, Gate::Tanh}) {
    Pair p(routing_config(CausalMethod::Aux, gate));
    p.expect_equal(random_sequences(), TopK{}, kTopK);
    p.expect_equal(random_sequences(), kCausalRouter, kByRouter);
  }
}

// Fails when x' = g (x + f).
TEST(KnownBugs, ResidualScaledByTheGate) { expect_every_gate_equal(); }

// Fails when x' = x + (x + g f), for the kept rows or for all.
TEST(KnownBugs, ResidualDoubled) { expect_every_gate_equal(); }

// Fails when the kept rows stand in the order of their scores: attention then looks ahead.
TEST(KnownBugs, UnsortedIndices) {
  Pair p(routing_config(CausalMethod::Aux));
  const Sequences in = random_sequences();
  const ReferenceResult expected = p.reference.run(in, kTopK);
  for (const auto& [layer, routed] : expected.routed) {
    Values kept;  // the order by score has to be another one for this to mean anything
    for (std::int32_t i : routed.rows()) kept.push_back(routed.scores[static_cast<std::size_t>(i)]);
    EXPECT_FALSE(std::is_sorted(kept.rbegin(), kept.rend())) << layer;
  }
  for (const RoutedLayer& routed : p.engine.forward(p.c, p.batch(in), TopK{}).routing) {
    const std::vector<std::int32_t> rows = p.rows(routed);
    EXPECT_TRUE(std::is_sorted(rows.begin(), rows.end())) << "block " << routed.layer;
  }
  p.expect_equal(in, TopK{}, kTopK);
}

// Fails when RoPE turns the kept rows by 0, 1, 2, ...
TEST(KnownBugs, PositionsOfTheCompactedSequence) {
  Pair p(routing_config(CausalMethod::Aux));
  p.expect_equal(random_sequences(), TopK{}, kTopK);
  p.expect_equal(random_sequences(), kCausalRouter, kByRouter);
}

// Fails when the gate is a softmax over the kept rows' scores, which also looks ahead.
TEST(KnownBugs, SoftmaxOverSelectedWeights) {
  Pair p(routing_config(CausalMethod::Aux));
  p.expect_equal(random_sequences(), kCausalRouter, kByRouter);
  p.expect_equal(random_sequences(), TopK{}, kTopK);
  // A kept token's output does not depend on whether a later token is kept.
  Sequences in = random_sequences(1);
  const auto stream = [&] {
    Values last;
    p.engine.forward(p.c, p.batch(in), kCausalRouter, [&](std::int64_t after, const Tensor& x) {
      if (after == 2) last = p.host(x);
    });
    last.resize(static_cast<std::size_t>(11 * model_config().width));
    return last;
  };
  const Values before = stream();
  for (std::int32_t token = 0; token < 19; ++token) {
    in.tokens[11] = token;
    EXPECT_LT(relative_difference(stream(), before), kTolerance) << "with last token " << token;
  }
}

// Fails when every routed block reads the first one's router.
TEST(KnownBugs, OneRouterSharedByAllLayers) {
  Pair p(routing_config(CausalMethod::Aux));
  const Sequences in = random_sequences();
  const ReferenceResult expected = p.reference.run(in, kTopK);
  const ForwardResult got = p.engine.forward(p.c, p.batch(in), TopK{});
  ASSERT_EQ(got.routing.size(), 2U);
  for (const RoutedLayer& routed : got.routing) {
    EXPECT_LT(relative_difference(p.host(routed.scores), expected.routed.at(routed.layer).scores), kTolerance)
        << "block " << routed.layer;
  }
  // Each router moves its own block's scores and no other's.
  Values other = p.reference.parameters().at(router(3));
  for (double& x : other) x = 1 - x;
  p.set(router(3), other);
  const ForwardResult changed = p.engine.forward(p.c, p.batch(in), TopK{});
  EXPECT_EQ(p.host(changed.routing[0].scores), p.host(got.routing[0].scores));
  EXPECT_NE(p.host(changed.routing[1].scores), p.host(got.routing[1].scores));
}

// Fails when membership is looked up by the place within the sequence, so that all targets fall on the first.
TEST(KnownBugs, PredictorTargetNotOffsetByBatch) {
  Pair p(routing_config(CausalMethod::Predictor));
  const Sequences in = random_sequences();
  const ReferenceResult expected = p.reference.run(in, kTopK);
  const LossSums sums = p.backward(in);
  EXPECT_NEAR(sums.predictor / static_cast<double>(sums.rows), p.reference.predictor_loss(expected), 1e-12);
  for (const auto& [layer, routed] : expected.routed) {
    double slope = 0;  // of the last bias, by hand
    for (std::size_t i = 0; i < routed.kept.size(); ++i) {
      slope += (sigmoid(routed.predicted[i]) - (routed.kept[i] ? 1 : 0)) / (kBatch * kSeq * 2.0);
    }
    const std::string bias = "model.layers." + std::to_string(layer) + ".router_predictor.2.bias";
    EXPECT_NEAR(p.gradient(bias).at(0), slope, 1e-12) << layer;
  }
}

// Fails when the gate multiplies by the predictor's logit: it says who goes, the router says how much.
TEST(KnownBugs, PredictorValueUsedAsGate) {
  for (const CausalMethod method : {CausalMethod::Predictor, CausalMethod::Both}) {
    for (const Gate gate : {Gate::Raw, Gate::Sigmoid}) {
      Pair p(routing_config(method, gate));
      p.expect_equal(random_sequences(), TopK{}, kTopK);
      p.expect_equal(random_sequences(), kCausalPredictor, kByPredictor);
    }
  }
}

// Fails when the causal rule ranks the tokens of a sequence.
TEST(KnownBugs, CausalEvaluationThatSilentlyIsTopK) {
  Pair p(routing_config(CausalMethod::Both));
  const Sequences in = random_sequences();
  for (const double threshold : {0.2, 0.4, 0.5, 0.6, 0.8}) {
    p.expect_equal(in, Causal{Causal::Logit::Router, threshold}, {Choice::By::Router, threshold});
    p.expect_equal(in, Causal{Causal::Logit::Predictor, threshold}, {Choice::By::Predictor, threshold});
  }
  const auto kept = [&](double threshold) {
    return p.engine.forward(p.c, p.batch(in), Causal{Causal::Logit::Router, threshold})
        .routing[0]
        .indices.size();
  };
  EXPECT_EQ(kept(1e-9), kBatch * kSeq);  // everybody: top-k would keep 4 of each
  EXPECT_EQ(kept(1 - 1e-9), 0);          // nobody
}

// Fails when one new token is decoded as the top max(1, floor(C)) = 1 of one.
TEST(KnownBugs, EveryDecodedTokenSelectedBecauseKIsOne) {
  for (const CausalMethod method : {CausalMethod::Aux, CausalMethod::Predictor}) {
    Pair p(routing_config(method));
    Context c(make_cpu_backend({}, 1), DType::F32);
    Transformer engine(c, model_config(), routing_config(method), false);
    for (const ParameterSpec& spec : engine.parameters().specs()) {
      from_doubles(c.backend(), engine.parameters().get(spec.name), p.reference.parameters().at(spec.name));
    }
    int kept = 0, decided = 0;
    for (const double threshold : {0.3, 0.5, 0.7}) {
      const bool by_router = method == CausalMethod::Aux;
      const Causal rule{by_router ? Causal::Logit::Router : Causal::Logit::Predictor, threshold};
      const Choice choice{by_router ? Choice::By::Router : Choice::By::Predictor, threshold};
      for (std::int32_t token = 0; token < model_config().vocab_size; ++token) {
        const Sequences in{1, 1, {token}, {}, {}};
        p.expect_equal(in, rule, choice);
        const ReferenceResult expected = p.reference.run(in, choice);
        GenerateOptions options;
        options.tokens = 1;
        options.rule = rule;
        const Generated got = generate(c, engine, {token}, options);
        ASSERT_EQ(got.routed_fraction.size(), 2U);
        for (std::size_t i = 0; i < 2; ++i) {
          const bool goes = expected.routed.at(i == 0 ? 1 : 3).kept[0];
          EXPECT_EQ(got.routed_fraction[i], goes ? 1.0 : 0.0) << "token " << token;
          kept += goes ? 1 : 0;
          ++decided;
        }
      }
    }
    EXPECT_GT(kept, decided / 10);  // both outcomes have to occur
    EXPECT_LT(kept, decided - decided / 10);
  }
}

// Fails when a skipped position leaves a key and a value of zeros, which take their part of the softmax.
TEST(KnownBugs, ZeroKeysAndValuesAtSkippedPositions) {
  Pair p(routing_config(CausalMethod::Aux));
  p.expect_equal(random_sequences(), TopK{}, kTopK);
  p.expect_equal(random_sequences(), kCausalRouter, kByRouter);
}

// Fails when rows kept under a threshold, which are packed into one sequence, attend across its parts, and
// when documents within a sequence do.
TEST(KnownBugs, AttentionAcrossPackedSequences) {
  Pair p(routing_config(CausalMethod::Aux));
  Sequences in = random_sequences();
  p.expect_equal(in, kCausalRouter, kByRouter);
  for (std::int64_t i = 0; i < kBatch * kSeq; ++i)
    in.documents.push_back(i % kSeq < 5 ? 0 : i % kSeq < 9 ? 1 : 2);
  p.expect_equal(in, TopK{}, kTopK);
  p.expect_equal(in, kCausalRouter, kByRouter);
}

// Fails when a routed block computes all rows and drops those that were not kept. The counts are by hand.
TEST(KnownBugs, ComputeEverythingThenMask) {
  const ModelConfig m = model_config();
  const double d = static_cast<double>(m.head_dim()), width = static_cast<double>(m.width);
  Pair p(routing_config(CausalMethod::Aux));
  const auto launched = [&](const SelectionRule& rule) {
    FlopLog& log = p.c.backend().flop_log;
    log.enabled = true;
    log.clear();
    p.engine.forward(p.c, p.batch(random_sequences()), rule);
    return log.items();
  };
  const auto expect = [&](const std::map<std::string, double>& items, double rows, double pairs) {
    // rows: those of all four blocks together; pairs: query and key, the diagonal at half
    EXPECT_DOUBLE_EQ(items.at("mlp"), rows * 6 * width * static_cast<double>(m.ffn_hidden));
    EXPECT_DOUBLE_EQ(items.at("attention_proj"), rows * (2 * width * 4 * d + 2 * width * 2 * d));
    EXPECT_DOUBLE_EQ(items.at("attention_scores"), pairs * 4 * 2 * d);
  };
  const double dense_rows = 2.0 * kBatch * kSeq, dense_pairs = 2.0 * kBatch * kSeq * kSeq / 2;
  expect(launched(TopK{}), dense_rows + 2.0 * kBatch * 4, dense_pairs + 2.0 * kBatch * 4 * 4 / 2);
  expect(launched(Causal{Causal::Logit::Router, 1 - 1e-9}), dense_rows, dense_pairs);
}

// Fails when the gate lets no gradient through to the router.
TEST(KnownBugs, NoRouterGradientAtAll) {
  constexpr double kStep = 1e-4;
  for (const Gate gate : {Gate::Raw, Gate::Sigmoid, Gate::Tanh}) {
    Pair p(routing_config(CausalMethod::None, gate));
    const Sequences in = random_sequences();
    p.backward(in);
    for (std::int64_t layer : {1, 3}) {
      const Values gradient = p.gradient(router(layer));
      Values& weights = p.reference.parameters().at(router(layer));
      Values slopes;
      for (double& w : weights) {
        const double kept = w;
        const auto loss = [&](double offset) {
          w = kept + offset;
          return p.reference.cross_entropy(in, kTopK);
        };
        slopes.push_back((loss(-2 * kStep) - 8 * loss(-kStep) + 8 * loss(kStep) - loss(2 * kStep)) /
                         (12 * kStep));
        w = kept;
      }
      EXPECT_LT(relative_difference(gradient, slopes), 1e-8) << "block " << layer;
      EXPECT_GT(*std::max_element(slopes.begin(), slopes.end()), 1e-3);
    }
  }
}

}  // namespace
}  // namespace fathom::known_bugs
