#include "infer/quant/calibration_size.h"

#include <algorithm>
#include <cmath>

#include "infer/quant/calibrate.h"
#include "infer/quant/refit.h"

namespace fathom {

std::int64_t calibration_tokens_needed(Context& c, const Transformer& model, const SelectionRule& rule,
                                       std::span<const std::int32_t> tokens, std::int64_t seq,
                                       const CalibrationGoal& goal) {
  const std::int64_t have = std::ssize(tokens) / seq * seq;
  const std::int64_t most = std::max(have, goal.most / seq * seq);
  std::int64_t needed = have;
  if (most == have || (model.routed_layers().empty() && model.expert_layers().empty())) return have;
  const NoGrad no_grad(c);
  DecisionCounts counts;
  for (const Batch& batch : calibration_batches(c, tokens, seq)) counts.add(c, model.forward(c, batch, rule));
  const std::int64_t sequences = have / seq, most_sequences = most / seq;
  const auto reach = [&](std::int64_t taken, std::int64_t wanted) {
    if (taken >= wanted) return;
    // Of what was never taken nothing says how much reaches it.
    double enough = static_cast<double>(most_sequences);
    if (taken > 0) {
      const double times = static_cast<double>(wanted) / static_cast<double>(taken);
      enough = std::min(enough, std::ceil(static_cast<double>(sequences) * times));
    }
    needed = std::max(needed, static_cast<std::int64_t>(enough) * seq);
  };
  for (const std::int64_t layer : model.routed_layers()) reach(counts.taken(layer), goal.layer);
  for (const std::int64_t layer : model.expert_layers()) {
    for (std::int64_t e = 0; e < model.routing().experts.count; ++e)
      reach(counts.taken(layer, e), goal.expert);
  }
  return needed;
}

}  // namespace fathom
