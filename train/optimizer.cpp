#include "train/optimizer.h"

#include <cmath>

#include "src/ops/loss.h"

namespace fathom {

namespace {

Tensor part(const Tensor& arena, const ArenaRange& range) {
  return arena.rows(range.begin, range.begin + range.size);
}

}  // namespace

AdamW::AdamW(Context& c, const ParameterSet& parameters, const TrainConfig& config) : config_(config) {
  const Shape shape = parameters.gradients().shape();
  state_.m = c.zeros(shape, c.stat_dtype(), MemoryTag::Optimizer);
  state_.v = c.zeros(shape, c.stat_dtype(), MemoryTag::Optimizer);
}

AdamW::Norms AdamW::norms(Context& c, const ParameterSet& parameters) {
  const Tensor squares = c.empty_stat({static_cast<std::int64_t>(kParameterGroups)});
  record_norms(c, parameters, squares);
  return norms_of(to_doubles(c.backend(), squares).data());
}

void AdamW::record_norms(Context& c, const ParameterSet& parameters, const Tensor& squares) {
  for (std::size_t g = 0; g < kParameterGroups; ++g) {
    const auto at = static_cast<std::int64_t>(g);
    c.backend().sum_squares(squares.rows(at, at + 1),
                            part(parameters.gradients(), parameters.range(static_cast<ParameterGroup>(g))));
  }
}

AdamW::Norms AdamW::norms_of(const double* squares) {
  const auto of = [squares](ParameterGroup g) { return squares[static_cast<std::size_t>(g)]; };
  return {std::sqrt(of(ParameterGroup::Decayed) + of(ParameterGroup::Undecayed)),
          std::sqrt(of(ParameterGroup::Predictor))};
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
    const View working = parameters.working().defined() ? part(parameters.working(), range).view() : View{};
    c.backend().adamw(part(parameters.masters(), range), working, part(state_.m, range),
                      part(state_.v, range), part(parameters.gradients(), range), p);
  }
}

void begin_gradients(Context& c, const ParameterSet& parameters) {
  for (const ParameterGroup group : {ParameterGroup::Undecayed, ParameterGroup::Predictor}) {
    c.backend().fill(part(parameters.gradients(), parameters.range(group)), 0.0);
  }
  for (const ParameterSpec& spec : parameters.specs()) {
    if (spec.group == ParameterGroup::Decayed)
      parameters.get(spec.name).bound_gradient().set_begins_anew(true);
  }
}

void settle_gradients(Context& c, const ParameterSet& parameters) {
  for (const ParameterSpec& spec : parameters.specs()) {
    const Tensor& gradient = parameters.get(spec.name).bound_gradient();
    if (!gradient.begins_anew()) continue;
    c.backend().fill(gradient, 0.0);
    gradient.set_begins_anew(false);
  }
}

}  // namespace fathom
