#include "src/model/selection.h"

#include <cmath>
#include <vector>

#include "kernels/error.h"
#include "src/autograd/context.h"
#include "src/ops/routing.h"

namespace fathom {

double logit(double probability) { return std::log(probability / (1.0 - probability)); }

// x - t > 0 where x > t, in either precision: a difference of two numbers rounds to 0 only where they are
// equal.
Tensor row_shifts(Context& c, std::span<const double> thresholds) {
  Tensor shifts = c.empty_stat({static_cast<std::int64_t>(thresholds.size())});
  const bool is_double = shifts.dtype() == DType::F64;
  std::vector<double> values;
  values.reserve(thresholds.size());
  for (const double t : thresholds)
    values.push_back(is_double ? -logit(t) : -double{ops::fp32_below(logit(t))});
  from_doubles(c.backend(), shifts, values);
  return shifts;
}

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
  if (routing.routes_depth() && routing.selection == Selection::Stochastic)
    return Stochastic{seed, step, 0, {}};
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
