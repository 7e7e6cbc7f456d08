// The learning rate by step: linear warm-up, then constant, cosine, or stable-then-linear-decay (WSD).
//
// With t = step + 1, W warm-up steps, N steps in all, D decaying ones and m = min_lr_ratio:
//   t <= W:   lr * t / W                              (so step 0 already moves)
//   cosine:   lr * (m + (1 - m) * (1 + cos(pi * p)) / 2),   p = (t - W) / (N - W)
//   wsd:      lr until t = N - D, then lr * (1 - (1 - m) * p),   p = (t - (N - D)) / D
// so the last step, t = N, runs at exactly m * lr, and so does every step after it.
#pragma once

#include <cstdint>

#include "src/config/config.h"

namespace fathom {

class LrSchedule {
 public:
  /// `total_steps`: N, from the horizon. UsageError: the warm-up is longer than the run.
  LrSchedule(const TrainConfig& config, std::int64_t total_steps);

  /// The rate for 0-based `step`.
  double at(std::int64_t step) const;

  std::int64_t warmup_steps() const { return warmup_; }
  std::int64_t decay_steps() const { return decay_; }
  std::int64_t total_steps() const { return total_; }

 private:
  Schedule schedule_;
  double lr_;
  double min_ratio_;
  std::int64_t total_;
  std::int64_t warmup_;
  std::int64_t decay_;
};

}  // namespace fathom
