// A small model of each kind, for the tests of what quantizers see and make of models.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "tests/model/small_model.h"

namespace fathom::model_test {

struct ModelKind {
  std::string name;
  RoutingConfig routing;
  SelectionRule rule;
  friend void PrintTo(const ModelKind& k, std::ostream* out) { *out << k.name; }
};

inline std::vector<ModelKind> model_kinds() {
  const Causal by_router{Causal::Logit::Router, 0.5}, by_predictor{Causal::Logit::Predictor, 0.5};
  return {
      {"dense", by(CausalMethod::None), TopK{}},
      {"mod", routed(CausalMethod::Both, Gate::Sigmoid, 0.5), by_predictor},
      {"mod_raw", routed(CausalMethod::Aux, Gate::Raw, 0.5), by_router},
      {"mod_top_k", routed(CausalMethod::None, Gate::Tanh, 0.5), TopK{}},
      {"moe", with_experts(by(CausalMethod::Predictor), RoutingKind::Moe), by_predictor},
      {"moe_by_token", tokens_choose(by(CausalMethod::None), RoutingKind::Moe, 2), by_router},
      {"mode_staged", with_experts(routed(CausalMethod::Predictor), RoutingKind::ModeStaged), by_predictor},
      {"mode_integrated", with_experts(by(CausalMethod::Both), RoutingKind::ModeIntegrated), by_router},
  };
}

}  // namespace fathom::model_test
