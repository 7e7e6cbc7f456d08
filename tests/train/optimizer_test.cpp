// AdamW over the arenas against a loop over named parameters.
#include "train/optimizer.h"

#include <cmath>
#include <map>
#include <random>

#include <gtest/gtest.h>

#include "src/model/transformer.h"

namespace fathom {
namespace {

using Values = std::vector<double>;

bool of_predictor(const std::string& name) { return name.find("router_predictor") != std::string::npos; }
/// Matrices of the model decay; norms, routers and predictors do not.
bool decays(const std::string& name) {
  return name.find("proj") != std::string::npos || name == "model.embed_tokens.weight" ||
         name == "lm_head.weight";
}

struct Precision {
  DType dtype;
  friend void PrintTo(const Precision& p, std::ostream* out) { *out << name_of(p.dtype); }
};

class Optimizer : public ::testing::TestWithParam<Precision> {
 protected:
  Optimizer() : c_(make_cpu_backend({}, 2), GetParam().dtype), model_(c_, model(), routing(), true) {
    std::mt19937_64 generator(3);
    std::normal_distribution<double> normal;
    for (const ParameterSpec& spec : parameters().specs()) {
      Values& p = expected_[spec.name].p;
      p.resize(static_cast<std::size_t>(spec.shape.size()));
      for (double& x : p) x = normal(generator);
      from_doubles(c_.backend(), parameters().get(spec.name), p);
      p = to_doubles(c_.backend(), parameters().get(spec.name));
      expected_[spec.name].m.assign(p.size(), 0.0);
      expected_[spec.name].v.assign(p.size(), 0.0);
    }
  }

  static ModelConfig model() {
    ModelConfig m;
    m.vocab_size = 11;
    m.width = 8;
    m.depth = 2;
    m.heads = m.kv_heads = 2;
    m.ffn_hidden = 6;
    m.max_seq_len = 8;
    m.qk_norm = true;
    return m;
  }
  static RoutingConfig routing() {
    RoutingConfig r;
    r.kind = RoutingKind::Mod;
    r.causal.method = CausalMethod::Both;
    r.causal.predictor_hidden = 3;
    return r;
  }
  ParameterSet& parameters() { return model_.parameters(); }

  /// Random gradients, those of the predictors times `predictor`, the others times `rest`.
  void give_gradients(unsigned seed, double rest, double predictor) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> normal;
    for (const ParameterSpec& spec : parameters().specs()) {
      const Tensor& g = parameters().get(spec.name).bound_gradient();
      Values values(static_cast<std::size_t>(g.size()));
      for (double& x : values) x = normal(generator) * (of_predictor(spec.name) ? predictor : rest);
      from_doubles(c_.backend(), g, values);
      gradients_[spec.name] = to_doubles(c_.backend(), g);
    }
  }

  double norm_by_hand(bool predictor) const {
    double sum = 0;
    for (const auto& [name, g] : gradients_) {
      for (double x : g) sum += of_predictor(name) == predictor ? x * x : 0;
    }
    return std::sqrt(sum);
  }

  void expect_step(AdamW& adam, const TrainConfig& t, double lr, std::int64_t step) {
    const AdamW::Norms norms = AdamW::norms(c_, parameters());
    const double tolerance = GetParam().dtype == DType::F64 ? 1e-13 : 1e-6;
    EXPECT_NEAR(norms.model, norm_by_hand(false), tolerance * norms.model);
    EXPECT_NEAR(norms.predictor, norm_by_hand(true), tolerance * norms.predictor);
    adam.update(c_, parameters(), norms, lr, step);
    const double b1 = t.betas[0], b2 = t.betas[1];
    for (auto& [name, e] : expected_) {
      const double norm = norm_by_hand(of_predictor(name));
      const double clip = t.grad_clip > 0 && norm > t.grad_clip ? t.grad_clip / norm : 1.0;
      for (std::size_t i = 0; i < e.p.size(); ++i) {
        const double g = gradients_[name][i] * clip;
        e.m[i] = b1 * e.m[i] + (1 - b1) * g;
        e.v[i] = b2 * e.v[i] + (1 - b2) * g * g;
        const double m = e.m[i] / (1 - std::pow(b1, static_cast<double>(step)));
        const double v = e.v[i] / (1 - std::pow(b2, static_cast<double>(step)));
        if (decays(name)) e.p[i] -= lr * t.weight_decay * e.p[i];
        e.p[i] -= lr * m / (std::sqrt(v) + t.eps);
      }
      const Values got = to_doubles(c_.backend(), parameters().get(name));
      for (std::size_t i = 0; i < got.size(); ++i) {
        ASSERT_NEAR(got[i], e.p[i], 4 * tolerance * std::max(1.0, std::abs(e.p[i])))
            << name << "[" << i << "]";
      }
    }
  }

  struct Expected {
    Values p, m, v;
  };
  Context c_;
  Transformer model_;
  std::map<std::string, Expected> expected_;
  std::map<std::string, Values> gradients_;
};

TEST_P(Optimizer, IsAdamWWithDecayOnMatricesOnly) {
  TrainConfig t;
  t.weight_decay = 0.3;
  t.grad_clip = 0;
  t.betas = {0.8, 0.97};
  t.eps = 1e-4;
  AdamW adam(c_, parameters(), t);
  for (std::int64_t step = 1; step <= 5; ++step) {
    give_gradients(static_cast<unsigned>(step), 0.1, 0.2);
    expect_step(adam, t, 0.03 / static_cast<double>(step), step);
  }
}

// Four ways: neither is above the limit, one is, the other is, both are.
TEST_P(Optimizer, ClipsModelAndPredictorsApart) {
  TrainConfig t;
  t.grad_clip = 1.0;
  AdamW adam(c_, parameters(), t);
  std::int64_t step = 0;
  for (const double rest : {1e-3, 1.0}) {
    for (const double predictor : {1e-3, 1.0}) {
      give_gradients(static_cast<unsigned>(++step), rest, predictor);
      EXPECT_EQ(norm_by_hand(false) > 1, rest == 1.0);
      EXPECT_EQ(norm_by_hand(true) > 1, predictor == 1.0);
      expect_step(adam, t, 0.02, step);
    }
  }
}

TEST_P(Optimizer, PaddingStaysZeroAndGradientsThatNothingReachesAreZero) {
  TrainConfig t;
  AdamW adam(c_, parameters(), t);
  give_gradients(1, 1.0, 1.0);
  adam.update(c_, parameters(), AdamW::norms(c_, parameters()), 0.1, 1);
  const auto sum_of_absolutes = [&](const Tensor& x) {
    double sum = 0;
    for (double e : to_doubles(c_.backend(), x)) sum += std::abs(e);
    return sum;
  };
  double named = 0;
  for (const ParameterSpec& spec : parameters().specs())
    named += sum_of_absolutes(parameters().get(spec.name));
  EXPECT_NEAR(sum_of_absolutes(parameters().masters()), named, 1e-9 * named);
  EXPECT_GT(parameters().masters().size(), parameters().count()) << "nothing is padded here";
  EXPECT_GT(sum_of_absolutes(parameters().gradients()), 0);
  begin_gradients(c_, parameters());
  settle_gradients(c_, parameters());
  EXPECT_EQ(sum_of_absolutes(parameters().gradients()), 0);
}

// The groups are what the optimizer goes by.
TEST_P(Optimizer, GroupsByName) {
  int counts[kParameterGroups] = {};
  for (const ParameterSpec& spec : parameters().specs()) {
    const ParameterGroup expected = of_predictor(spec.name) ? ParameterGroup::Predictor
                                    : decays(spec.name)     ? ParameterGroup::Decayed
                                                            : ParameterGroup::Undecayed;
    EXPECT_EQ(spec.group, expected) << spec.name;
    ++counts[static_cast<std::size_t>(spec.group)];
  }
  EXPECT_EQ(counts[0], 2 + 2 * 4);      // embedding, head; four matrices a block
  EXPECT_EQ(counts[1], 1 + 2 * 4 + 1);  // last norm; four norms a block; one router
  EXPECT_EQ(counts[2], 4);
}

INSTANTIATE_TEST_SUITE_P(Cpu, Optimizer, ::testing::Values(Precision{DType::F32}, Precision{DType::F64}),
                         [](const auto& p) { return name_of(p.param.dtype); });

}  // namespace
}  // namespace fathom
