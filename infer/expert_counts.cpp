#include "infer/expert_counts.h"

#include <algorithm>

namespace fathom {

std::vector<std::vector<double>> ExpertCounts::shares() const {
  std::vector<std::vector<double>> all;
  for (std::size_t layer = 0; layer < rows.size(); ++layer) {
    const auto of = static_cast<double>(std::max<std::int64_t>(1, layer_rows[layer]));
    all.emplace_back();
    for (const std::int64_t taken : rows[layer]) all.back().push_back(static_cast<double>(taken) / of);
  }
  return all;
}

}  // namespace fathom
