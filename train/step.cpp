#include "train/step.h"

#include <cmath>

#include <fmt/format.h>

#include "src/autograd/tape.h"
#include "train/signals.h"

namespace fathom {

bool StepOutcome::finite() const {
  return std::isfinite(loss) && std::isfinite(aux) && std::isfinite(predictor) &&
         std::isfinite(norms.model) && std::isfinite(norms.predictor);
}

std::optional<StepOutcome> StepRunner::gradients(std::int64_t step, std::int64_t first_sequence,
                                                 bool statistics) {
  const std::int64_t micro = config_.micro_batch_sequences();
  const std::int64_t parts = config_.accumulation();
  const double weight = 1.0 / static_cast<double>(parts);
  const SelectionRule rule = training_rule(config_.routing, config_.seed, static_cast<std::uint64_t>(step));
  StepOutcome outcome;
  zero_gradients(context_, model_.parameters());
  for (std::int64_t part = 0; part < parts; ++part) {
    if (stop_requested()) return std::nullopt;
    const Batch batch = data_.shuffled(context_, config_.seed, first_sequence + part * micro, micro);
    Tape tape(context_);
    ForwardResult result;
    LossSums sums;
    {
      const Recording recording(context_, tape);
      result = model_.forward(context_, batch, rule);
      sums = model_.objective(context_, batch, result, weight);
    }
    const double rows = static_cast<double>(sums.rows) * static_cast<double>(parts);
    outcome.loss += sums.cross_entropy / rows;
    outcome.aux += sums.aux / rows;
    outcome.predictor += sums.predictor / rows;
    if (statistics && part + 1 == parts) {
      for (const RoutedLayer& routed : result.routing) {
        outcome.routing.push_back(summarise(context_, routed, config_.routing));
      }
    }
    tape.backward();
  }
  outcome.norms = AdamW::norms(context_, model_.parameters());
  return outcome;
}

std::string StepRunner::trace(std::int64_t step, std::int64_t first_sequence) {
  for (const ParameterSpec& spec : model_.parameters().specs()) {
    if (context_.backend().count_nonfinite(model_.parameters().get(spec.name)) > 0) {
      return fmt::format("the parameter {} was not finite before the step", spec.name);
    }
  }
  context_.trace_nonfinite(true);
  const bool whole = gradients(step, first_sequence, false).has_value();
  std::string found = whole ? "no single op (the values overflow only in a sum over the whole model)"
                            : "not looked for (a signal came first)";
  if (const NonFinite* culprit = context_.found_nonfinite()) {
    found = fmt::format("{}{} ({} of its values)", culprit->op,
                        culprit->layer.empty() ? "" : " of " + culprit->layer, culprit->count);
  }
  context_.trace_nonfinite(false);
  return found;
}

}  // namespace fathom
