#include "kernels/rope_scaling.h"

#include <algorithm>
#include <numbers>

namespace fathom {

double scaled_frequency(double frequency, const RopeScaling& scaling) {
  if (scaling.kind == RopeScalingKind::None) return frequency;
  const double longer = frequency / scaling.factor;
  if (scaling.kind == RopeScalingKind::Linear) return longer;
  const double turns = static_cast<double>(scaling.original_max_seq_len) * frequency / (2 * std::numbers::pi);
  const double share =
      (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
  const double kept = std::clamp(share, 0.0, 1.0);
  return (1 - kept) * longer + kept * frequency;
}

}  // namespace fathom
