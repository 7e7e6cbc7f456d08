#include "src/model/selection.h"

#include <cmath>

#include "kernels/error.h"

namespace fathom {

double logit(double probability) { return std::log(probability / (1.0 - probability)); }

GateKind gate_kind(Gate gate) {
  switch (gate) {
    case Gate::Raw:
      return GateKind::Raw;
    case Gate::Sigmoid:
      return GateKind::Sigmoid;
    case Gate::Tanh:
      return GateKind::Tanh;
  }
  return GateKind::Raw;
}

SelectionRule training_rule(const RoutingConfig& routing, std::uint64_t seed, std::uint64_t step) {
  if (routing.routes_depth() && routing.selection == Selection::Stochastic) return Stochastic{seed, step, {}};
  return TopK{};
}

Causal causal_rule(const RoutingConfig& routing) {
  if (routing.needs_future()) {
    throw UserError(
        "This model was trained with routing.causal.method: none, so it has no way to choose tokens without "
        "seeing the ones that follow, and cannot be decoded.",
        "Train it with method aux, predictor or both.");
  }
  const bool predictor = routing.has_predictor();
  return {predictor ? Causal::Logit::Predictor : Causal::Logit::Router, routing.causal.threshold};
}

}  // namespace fathom
