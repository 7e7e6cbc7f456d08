#include "src/config/config.h"

#include <algorithm>
#include <cmath>

namespace fathom {

std::int64_t kept_tokens(double capacity, std::int64_t seq_len) {
  const auto k = static_cast<std::int64_t>(std::floor(capacity * static_cast<double>(seq_len)));
  return std::clamp<std::int64_t>(k, 1, seq_len);
}

std::int64_t expert_tokens(const ExpertsConfig& experts, std::int64_t seq_len) {
  const double k =
      std::floor(experts.capacity_factor * static_cast<double>(seq_len) / static_cast<double>(experts.count));
  return std::clamp<std::int64_t>(static_cast<std::int64_t>(k), 1, seq_len);
}

}  // namespace fathom
