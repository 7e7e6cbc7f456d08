// What a training records, made from what it measured.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/model/checkpoint.h"
#include "train/evaluate.h"
#include "train/inputs.h"
#include "train/metrics/record.h"
#include "train/step.h"

namespace fathom {

/// The run's constants. `device` and `git_sha` are for people.
RunFacts facts_of(const TrainingInputs& inputs, const std::vector<std::int64_t>& routed_layers,
                  std::string device, std::string git_sha);

/// What a step's record says besides the step's own outcome.
struct StepPace {
  std::int64_t steps = 0;  // since the previous record
  double seconds = 0;      // of these steps
  double lr = 0;
  double peak_flops_per_s = 0;  // of the machine; 0: unknown
  double memory_bytes = 0;      // peak of tensors
  double memory_held_bytes = 0;
  double device_used_bytes = 0;  // 0: unknown
};

/// `state` is that after the step.
StepRecord step_record(const Config& config, const TrainingState& state, const StepOutcome& outcome,
                       const StepPace& pace, const std::vector<std::int64_t>& routed_layers);

EvalRecord evaluation_record(const TrainingState& state, const EvalResult& result);

EventRecord event_at(const TrainingState& state, EventKind kind, std::string message = "");
EventRecord end_record(const TrainingState& state, RunStatus status, std::string message);

}  // namespace fathom
