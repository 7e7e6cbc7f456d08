// What decides over a training step's update, in words that a device understands as well as the host:
// captured work decides without asking anybody.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace fathom {

/// Of AdamW, what stays from step to step.
struct AdamWParams {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
};

/// What does not: it lies in the backend's memory, fp64 [kUpdateNumbers], where captured work finds the
/// step's own.
struct UpdateNumbers {
  double lr = 0;
  double bias1 = 1;           // 1 - beta1^t, t being 1 at the first update
  double root_bias2 = 1;      // sqrt(1 - beta2^t)
  double gradient_scale = 1;  // multiplied to the gradient first: clipping
  double applied = 1;         // 0: the update is not made
};
inline constexpr std::int64_t kUpdateNumbers = 5;
static_assert(sizeof(UpdateNumbers) == kUpdateNumbers * sizeof(double));

/// Those of update number `step`, from 1.
UpdateNumbers update_numbers(const AdamWParams& p, double lr, std::int64_t step, double gradient_scale = 1);

/// The running mean of the loss, which spikes are measured against; fp64 [kLossMeanNumbers] where captured
/// work keeps it.
struct LossMean {
  double mean = 0;    // nats a token; begins as the plain mean
  double steps = 0;   // that it is of
  double halted = 0;  // not 0: a step's update was not made, so none of those behind it may be
};
inline constexpr std::int64_t kLossMeanNumbers = 3;
static_assert(sizeof(LossMean) == kLossMeanNumbers * sizeof(double));

inline constexpr double kSettledSteps = 20;    // before the running mean means something
inline constexpr double kSlowestShare = 0.02;  // of a loss in the running mean

/// Gradients come in three groups: the first two are clipped by their common norm, the last by its own.
inline constexpr std::int64_t kClipGroups = 3;

struct StepRule {
  std::int64_t parts = 1;       // micro-batches
  std::int64_t slots = 1;       // losses that each leaves: sums, the first one of its cross-entropy
  std::int64_t rows = 1;        // tokens of a micro-batch
  double grad_clip = 0;         // 0: no clipping
  double spike_factor = 0;      // a loss of more than this times the running mean is a spike
  bool refuses_spikes = false;  // a spike's update is not made; one that is not finite never is
};

/// Clip factor of a group with this norm.
double clip_factor(const StepRule& rule, double norm);
/// The norm over the first two groups, and that of the last, of their sums of squares.
double model_norm(const double* squares);
double predictor_norm(const double* squares);
bool is_spike(const StepRule& rule, const LossMean& mean, double loss);
/// Takes the loss of a step whose update is made.
void take_loss(LossMean& mean, double loss);

/// Backend::judge_step where the memory is the host's. Everything is computed in fp64 and rounded at each
/// operation, so that a device that does the same decides the same.
void judge_step_on_host(View numbers, View mean, View applied, ConstView losses, ConstView squares,
                        const StepRule& rule);

}  // namespace fathom
