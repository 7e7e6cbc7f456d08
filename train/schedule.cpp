#include "train/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include <fmt/core.h>

#include "kernels/error.h"

namespace fathom {

LrSchedule::LrSchedule(const TrainConfig& config, std::int64_t total_steps)
    : schedule_(config.schedule), lr_(config.lr), min_ratio_(config.min_lr_ratio), total_(total_steps) {
  const auto total = static_cast<double>(total_);
  warmup_ = std::llround(config.warmup < 1.0 ? config.warmup * total : config.warmup);
  if (warmup_ > total_) {
    throw UsageError(fmt::format("train.warmup is {} steps, but the run has only {}.", warmup_, total_),
                     "Lower train.warmup (below 1 it is a share of the steps), or lengthen the run.");
  }
  decay_ = schedule_ == Schedule::Wsd
               ? std::min<std::int64_t>(std::llround(config.wsd_decay * total), total_ - warmup_)
               : 0;
}

double LrSchedule::at(std::int64_t step) const {
  const std::int64_t t = std::min(step + 1, total_);
  if (t <= warmup_) return lr_ * static_cast<double>(t) / static_cast<double>(warmup_);
  switch (schedule_) {
    case Schedule::Constant:
      return lr_;
    case Schedule::Cosine: {
      const double p = static_cast<double>(t - warmup_) / static_cast<double>(total_ - warmup_);
      return lr_ * (min_ratio_ + (1.0 - min_ratio_) * 0.5 * (1.0 + std::cos(std::numbers::pi * p)));
    }
    case Schedule::Wsd: {
      const std::int64_t into_decay = t - (total_ - decay_);
      if (into_decay <= 0) return lr_;
      return lr_ * (1.0 - (1.0 - min_ratio_) * static_cast<double>(into_decay) / static_cast<double>(decay_));
    }
  }
  throw InternalError("[schedule] unknown schedule");
}

}  // namespace fathom
