#include "src/config/config.h"

#include <algorithm>
#include <cmath>

namespace fathom {

std::int64_t kept_tokens(double capacity, std::int64_t seq_len) {
  const auto k = static_cast<std::int64_t>(std::floor(capacity * static_cast<double>(seq_len)));
  return std::clamp<std::int64_t>(k, 1, seq_len);
}

std::int64_t expert_tokens(const ExpertsConfig& experts, std::int64_t seq_len) {
  if (experts.choice == ExpertsChoose::Token && experts.capacity_factor == 0) return seq_len;
  const double each = experts.choice == ExpertsChoose::Token ? static_cast<double>(experts.top_k) : 1.0;
  const double k = std::floor(experts.capacity_factor * each * static_cast<double>(seq_len) /
                              static_cast<double>(experts.count));
  return std::clamp<std::int64_t>(static_cast<std::int64_t>(std::min(k, 1e18)), 1, seq_len);
}

}  // namespace fathom
