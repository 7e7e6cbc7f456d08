// How the experts of a layer shared the tokens of a batch: from the device to the metrics.
#pragma once

#include <cstdint>

#include "src/model/transformer.h"
#include "train/metrics/record.h"

namespace fathom {

inline constexpr std::int64_t kExpertStats = 8;  // elements that a layer leaves

/// Into stat [kExpertStats], without waiting for the device.
void record_expert_stats(Context& c, const ExpertLayer& layer, const Tensor& out);
ExpertStats expert_stats_of(const double* values);

}  // namespace fathom
