// How the experts of a layer shared the tokens of a batch: from the device to the metrics.
#pragma once

#include <cstdint>
#include <vector>

#include "src/model/transformer.h"
#include "train/metrics/record.h"

namespace fathom {

inline constexpr std::int64_t kExpertStats = 8;  // elements that a layer leaves

/// Into stat [kExpertStats], without waiting for the device.
void record_expert_stats(Context& c, const ExpertLayer& layer, const Tensor& out);
ExpertStats expert_stats_of(const double* values);
/// Of ranks that saw as many tokens: means, and of the busiest and the idlest expert the extremes.
ExpertStats over_ranks(const std::vector<ExpertStats>& ranks);

}  // namespace fathom
