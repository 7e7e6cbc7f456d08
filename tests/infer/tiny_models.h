// Tiny random models of every kind of routing.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "src/autograd/context.h"
#include "src/model/transformer.h"

namespace fathom::tiny_models {

constexpr std::int64_t kVocab = 31;

/// A kind of routing.
struct Case {
  std::string name;
  RoutingConfig routing;
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }
};

inline RoutingConfig depth(CausalMethod method, std::int64_t every = 2) {
  RoutingConfig r;
  r.kind = RoutingKind::Mod;
  r.capacity = 0.25;
  r.every = every;
  r.causal.method = method;
  r.causal.predictor_hidden = 5;
  return r;
}

inline RoutingConfig experts(RoutingKind kind, ExpertsChoose choice, std::int64_t top_k = 1) {
  RoutingConfig r =
      depth(choice == ExpertsChoose::Token && kind == RoutingKind::Moe ? CausalMethod::None
                                                                       : CausalMethod::Predictor);
  r.kind = kind;
  r.experts.count = 3;
  r.experts.choice = choice;
  r.experts.top_k = top_k;
  r.experts.noop = kind == RoutingKind::ModeIntegrated ? 2 : 0;
  return r;
}

inline std::vector<Case> cases() {
  return {{"dense", {}},
          {"aux", depth(CausalMethod::Aux)},
          {"predictor", depth(CausalMethod::Predictor)},
          {"every_layer", depth(CausalMethod::Predictor, 1)},
          {"moe", experts(RoutingKind::Moe, ExpertsChoose::Expert)},
          {"moe_token", experts(RoutingKind::Moe, ExpertsChoose::Token, 2)},
          {"mode_staged", experts(RoutingKind::ModeStaged, ExpertsChoose::Expert)},
          {"mode_integrated", experts(RoutingKind::ModeIntegrated, ExpertsChoose::Expert)}};
}

inline ModelConfig model_config(bool qk_norm, std::int64_t context = 80) {
  ModelConfig m;
  m.vocab_size = kVocab;
  m.width = 16;
  m.depth = 4;
  m.heads = 4;
  m.kv_heads = 2;
  m.ffn_hidden = 20;
  m.max_seq_len = context;
  m.qk_norm = qk_norm;
  return m;
}

/// A model whose routers keep about half of the rows, on the CPU or a GPU.
struct Model {
  Context c;
  Transformer model;
  Causal rule;

  Model(std::shared_ptr<Backend> backend, DType dtype, const RoutingConfig& routing,
        std::int64_t context = 80, std::uint64_t seed = 5)
      : c(std::move(backend), dtype), model(c, model_config(true, context), routing, false) {
    std::mt19937_64 generator(seed);
    std::normal_distribution<double> normal;
    for (const ParameterSpec& spec : model.parameters().specs()) {
      const bool norm = spec.name.find("norm") != std::string::npos;
      std::vector<double> values(static_cast<std::size_t>(spec.shape.size()));
      // 1 / sqrt(width): what a product gives is as large as what it got.
      for (double& x : values) x = norm ? 1 + 0.1 * normal(generator) : 0.25 * normal(generator);
      from_doubles(c.backend(), model.parameters().get(spec.name), values);
    }
    if (routing.kind != RoutingKind::None) rule = causal_rule(routing);
  }
};

/// How near the nearest decision about each row, or one before it, came to going the other way.
inline std::vector<double> margins(Model& m, const std::vector<std::int32_t>& ids, const Causal& rule) {
  const NoGrad no_grad(m.c);
  const auto n = static_cast<std::int64_t>(ids.size());
  const ForwardResult pass = m.model.forward(m.c, make_batch(m.c, 1, n, ids, {}), rule);
  std::vector<double> least(ids.size(), INFINITY);
  const double border = logit(rule.threshold);
  const bool predictor = rule.logit == Causal::Logit::Predictor;
  for (const RoutedLayer& l : pass.routing) {
    const auto scores = to_doubles(m.c.backend(), predictor ? l.predicted : l.scores);
    for (std::size_t i = 0; i < ids.size(); ++i) least[i] = std::min(least[i], std::fabs(scores[i] - border));
  }
  for (const ExpertLayer& e : pass.experts) {
    const Tensor& t = predictor ? e.predicted : e.scores;
    if (!t.defined()) continue;
    // Which row of the batch a row of the layer is does not matter: the least of all counts for all.
    for (const double s : to_doubles(m.c.backend(), t)) least[0] = std::min(least[0], std::fabs(s - border));
  }
  for (std::size_t i = 1; i < ids.size(); ++i) least[i] = std::min(least[i], least[i - 1]);
  return least;
}

}  // namespace fathom::tiny_models
