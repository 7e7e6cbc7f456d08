#include "train/spikes.h"

#include <fmt/format.h>

#include "train/records.h"

namespace fathom {

namespace {

constexpr std::int64_t kMostSkipped = 10;

std::string failure_of(const std::string& what, const TrainingState& state, OnSpike policy) {
  const std::string saved = state.step > 0 ? " The state before that step is saved." : "";
  if (policy == OnSpike::Stop) {
    return fmt::format(
        "Training stopped at {}.{} Go on past it with --set train.on_spike=skip, or start another run with a "
        "lower train.lr or a longer train.warmup.",
        what, saved);
  }
  return fmt::format(
      "Training stopped at {}.{} That were {} skipped steps in a row. Start another run with a lower "
      "train.lr "
      "or a longer train.warmup.",
      what, saved, kMostSkipped);
}

}  // namespace

LossMean mean_of(const TrainingState& state) {
  return {state.loss_average, static_cast<double>(state.steps_averaged), 0};
}

Judgement judge(const TrainConfig& config, TrainingState& state, const StepOutcome& outcome,
                const std::function<std::string()>& trace) {
  const bool broken = !outcome.finite();
  StepRule rule;
  rule.spike_factor = config.spike_factor;
  const bool spike = !broken && is_spike(rule, mean_of(state), outcome.loss);
  if (!broken && !spike) {
    state.skipped_in_a_row = 0;
    return {};
  }
  const std::int64_t number = state.step + 1;
  const std::string what =
      broken ? fmt::format("step {}: loss {}, gradient norm {}: first not finite: {}", number, outcome.loss,
                           outcome.norms.model, trace())
             : fmt::format("step {}: loss {:.4f} is more than {} times its running mean {:.4f}", number,
                           outcome.loss, config.spike_factor, state.loss_average);
  const auto event = [&](const char* and_then) {
    return event_at(state, broken ? EventKind::Nan : EventKind::Spike, what + and_then);
  };
  if (config.on_spike == OnSpike::Warn && spike) {
    return {StepVerdict::Apply, event(" (warned: train.on_spike)"), ""};
  }
  if (config.on_spike != OnSpike::Stop && state.skipped_in_a_row < kMostSkipped) {
    ++state.skipped_in_a_row;
    return {StepVerdict::Skip, event(" (its update is skipped)"), ""};
  }
  return {StepVerdict::StopRun, event(" (the run stops)"), failure_of(what, state, config.on_spike)};
}

void average(TrainingState& state, double loss) {
  LossMean mean = mean_of(state);
  take_loss(mean, loss);
  ++state.steps_averaged;
  state.loss_average = mean.mean;
}

}  // namespace fathom
