#include "train/expert_stats.h"

#include <algorithm>

namespace fathom {

void record_expert_stats(Context& c, const ExpertLayer& layer, const Tensor& out) {
  c.backend().expert_statistics(out, layer.affinity, layer.weights, layer.dispatch.slots,
                                layer.affinity.dim(0), layer.dispatch.shape);
}

ExpertStats expert_stats_of(const double* v) {
  return {.uncovered = v[0],
          .per_token = v[1],
          .dropped = v[2],
          .load_max = v[3],
          .load_min = v[4],
          .noop_affinity = v[5],
          .noop_share = v[6],
          .entropy = v[7]};
}

ExpertStats over_ranks(const std::vector<ExpertStats>& ranks) {
  ExpertStats all;
  all.load_max = ranks.front().load_max;
  all.load_min = ranks.front().load_min;
  const auto n = static_cast<double>(ranks.size());
  for (const ExpertStats& s : ranks) {
    for (double ExpertStats::*mean :
         {&ExpertStats::uncovered, &ExpertStats::per_token, &ExpertStats::dropped,
          &ExpertStats::noop_affinity, &ExpertStats::noop_share, &ExpertStats::entropy})
      all.*mean += s.*mean / n;
    all.load_max = std::max(all.load_max, s.load_max);
    all.load_min = std::min(all.load_min, s.load_min);
  }
  return all;
}

}  // namespace fathom
