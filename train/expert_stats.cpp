#include "train/expert_stats.h"

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

}  // namespace fathom
