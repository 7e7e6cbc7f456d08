// Loss spikes and numbers that are not finite: whether a step's update is applied, by train.on_spike. Loud
// either way.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "src/model/checkpoint.h"
#include "train/metrics/record.h"
#include "train/step.h"

namespace fathom {

enum class StepVerdict { Apply, Skip, StopRun };

struct Judgement {
  StepVerdict verdict = StepVerdict::Apply;
  std::optional<EventRecord> event;  // to be recorded
  std::string failure;               // of StopRun: for the user, with what to do
};

/// What the device measures spikes against, of the steps up to `state`.
LossMean mean_of(const TrainingState& state);

/// Judges the step after `state`, as the device did before (kernels/step_rule.h), whose skipped steps in a
/// row it counts. `trace` names the culprit of a number that is not finite; it is asked only then.
Judgement judge(const TrainConfig& config, TrainingState& state, const StepOutcome& outcome,
                const std::function<std::string()>& trace);

/// Takes an applied step's loss into what spikes are measured against: a running mean that starts as the
/// plain mean.
void average(TrainingState& state, double loss);

}  // namespace fathom
