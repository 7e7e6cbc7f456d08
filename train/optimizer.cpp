#include "train/optimizer.h"

#include <cmath>

#include "src/ops/loss.h"

namespace fathom {

namespace {

Tensor part(const Tensor& arena, const ArenaRange& range) {
  return arena.rows(range.begin, range.begin + range.size);
}

double squares(Context& c, const Tensor& x) {
  if (x.size() == 0) return 0;
  const Tensor out = c.empty_stat({1});
  c.backend().sum_squares(out, x);
  return item(c.backend(), out);
}

}  // namespace

AdamW::AdamW(Context& c, const ParameterSet& parameters, const TrainConfig& config) : config_(config) {
  const Shape shape = parameters.gradients().shape();
  state_.m = c.zeros(shape, c.stat_dtype(), MemoryTag::Optimizer);
  state_.v = c.zeros(shape, c.stat_dtype(), MemoryTag::Optimizer);
}

AdamW::Norms AdamW::norms(Context& c, const ParameterSet& parameters) {
  const Tensor& g = parameters.gradients();
  const double model = squares(c, part(g, parameters.range(ParameterGroup::Decayed))) +
                       squares(c, part(g, parameters.range(ParameterGroup::Undecayed)));
  return {std::sqrt(model), std::sqrt(squares(c, part(g, parameters.range(ParameterGroup::Predictor))))};
}

void AdamW::update(Context& c, ParameterSet& parameters, const Norms& norms, double lr, std::int64_t step) {
  const auto clip = [this](double norm) {
    return config_.grad_clip > 0 && norm > config_.grad_clip ? config_.grad_clip / norm : 1.0;
  };
  for (const ParameterGroup group :
       {ParameterGroup::Decayed, ParameterGroup::Undecayed, ParameterGroup::Predictor}) {
    const ArenaRange range = parameters.range(group);
    if (range.size == 0) continue;
    const AdamWParams p{lr,
                        config_.betas[0],
                        config_.betas[1],
                        config_.eps,
                        group == ParameterGroup::Decayed ? config_.weight_decay : 0.0,
                        step,
                        clip(group == ParameterGroup::Predictor ? norms.predictor : norms.model)};
    c.backend().adamw(part(parameters.values(), range), View{}, part(state_.m, range), part(state_.v, range),
                      part(parameters.gradients(), range), p);
  }
}

void zero_gradients(Context& c, const ParameterSet& parameters) {
  c.backend().fill(parameters.gradients(), 0.0);
}

}  // namespace fathom
