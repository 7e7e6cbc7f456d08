// Outside of the copies for AVX, where products and sums would be fused: the host's own decision and a GPU's
// are to be the same to the bit.
#include "kernels/step_rule.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

namespace {

double element(ConstView v, std::int64_t i) {
  return v.dtype == DType::F64 ? static_cast<const double*>(v.data)[i]
                               : static_cast<double>(static_cast<const float*>(v.data)[i]);
}

void require(const char* what, ConstView v, std::int64_t size, DType dtype) {
  if (v.size != size) {
    throw InternalError(fmt::format("[judge_step] {}: got {}, expected {}", what, v.size, size));
  }
  if (v.dtype != dtype) {
    throw InternalError(fmt::format("[judge_step] {} is {}, not {}", what, name_of(v.dtype), name_of(dtype)));
  }
}

}  // namespace

UpdateNumbers update_numbers(const AdamWParams& p, double lr, std::int64_t step, double gradient_scale) {
  const auto t = static_cast<double>(step);
  return {lr, 1.0 - std::pow(p.beta1, t), std::sqrt(1.0 - std::pow(p.beta2, t)), gradient_scale, 1.0};
}

double clip_factor(const StepRule& rule, double norm) {
  return rule.grad_clip > 0 && norm > rule.grad_clip ? rule.grad_clip / norm : 1.0;
}

double model_norm(const double* squares) { return std::sqrt(squares[0] + squares[1]); }
double predictor_norm(const double* squares) { return std::sqrt(squares[2]); }

bool is_spike(const StepRule& rule, const LossMean& mean, double loss) {
  return mean.steps >= kSettledSteps && loss > rule.spike_factor * mean.mean;
}

void take_loss(LossMean& mean, double loss) {
  mean.steps += 1.0;
  const double share = std::max(1.0 / mean.steps, kSlowestShare);
  mean.mean += share * (loss - mean.mean);
}

void judge_step_on_host(View numbers, View mean, View applied, ConstView losses, ConstView squares,
                        const StepRule& rule) {
  require("numbers", numbers, kClipGroups * kUpdateNumbers, DType::F64);
  require("mean", mean, kLossMeanNumbers, DType::F64);
  require("losses", losses, rule.parts * rule.slots, losses.dtype);
  require("squares", squares, kClipGroups, losses.dtype);
  require("applied", applied, 1, losses.dtype);
  bool finite = true;
  double loss = 0;
  const double all = static_cast<double>(rule.rows) * static_cast<double>(rule.parts);
  for (std::int64_t i = 0; i < losses.size; ++i) {
    const double value = element(losses, i);
    finite = finite && std::isfinite(value);
    if (i % rule.slots == 0) loss += value / all;
  }
  double sums[kClipGroups];
  for (std::int64_t g = 0; g < kClipGroups; ++g) {
    sums[g] = element(squares, g);
    finite = finite && std::isfinite(sums[g]);
  }
  auto& average = *static_cast<LossMean*>(mean.data);
  const bool goes = average.halted == 0 && finite && !(rule.refuses_spikes && is_spike(rule, average, loss));
  auto* groups = static_cast<UpdateNumbers*>(numbers.data);
  for (std::int64_t g = 0; g < kClipGroups; ++g) {
    groups[g].gradient_scale =
        clip_factor(rule, g + 1 < kClipGroups ? model_norm(sums) : predictor_norm(sums));
    groups[g].applied = goes ? 1.0 : 0.0;
  }
  if (goes) {
    take_loss(average, loss);
  } else {
    average.halted = 1.0;
  }
  if (applied.dtype == DType::F64) {
    *static_cast<double*>(applied.data) = goes ? 1.0 : 0.0;
  } else {
    *static_cast<float*>(applied.data) = goes ? 1.0F : 0.0F;
  }
}

}  // namespace fathom
