#include "train/routes/figures.h"

#include <algorithm>

#include "src/model/selection.h"

namespace fathom::routes {

namespace {

double ratio(double part, double whole) { return whole > 0 ? part / whole : 0; }

double share_above(const std::vector<double>& logits, double bound) {
  const auto above = std::count_if(logits.begin(), logits.end(), [bound](double l) { return l > bound; });
  return ratio(static_cast<double>(above), static_cast<double>(logits.size()));
}

}  // namespace

RouterFigures figures_of(const RoutedTokens& layer, double threshold) {
  const auto n = static_cast<double>(layer.scores.size());
  RouterFigures f;
  f.layer = layer.layer;
  for (const std::uint8_t k : layer.kept) f.kept += k;
  f.share = ratio(static_cast<double>(f.kept), n);
  f.above = share_above(layer.scores, logit(threshold));
  if (!layer.predicted.empty()) f.predicted_above = share_above(layer.predicted, logit(threshold));
  for (const double r : layer.scores) f.mean += r / n;
  const auto [low, high] = std::minmax_element(layer.scores.begin(), layer.scores.end());
  f.min = *low;
  f.max = *high;
  return f;
}

ExpertFigures figures_of(const ExpertTokens& layer) {
  const std::size_t n = layer.reached.size(), experts = static_cast<std::size_t>(layer.experts);
  const std::size_t choices = experts + static_cast<std::size_t>(layer.noops);
  ExpertFigures f;
  f.layer = layer.layer;
  f.load.resize(experts);
  double alone = 0, taken = 0, noop_affinity = 0, noop_first = 0, wanted = 0, noop_wanted = 0, dropped = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if (layer.reached[i] == 0) continue;
    ++f.reached;
    std::size_t first = 0;
    for (std::size_t e = 0; e < choices; ++e) {
      const std::size_t at = e * n + i;
      const bool noop = e >= experts, took = !noop && layer.taken[at] != 0;
      const bool chose = !layer.chosen.empty() && layer.chosen[at] != 0;
      if (took) ++f.load[e];
      if (noop) noop_affinity += layer.affinity[at];
      if (layer.affinity[at] > layer.affinity[first * n + i]) first = e;
      wanted += chose ? 1 : 0;
      noop_wanted += chose && noop ? 1 : 0;
      dropped += chose && !noop && !took ? 1 : 0;
    }
    const std::int64_t of_token = layer.experts_of(i);
    taken += static_cast<double>(of_token);
    alone += of_token == 0 ? 1 : 0;
    noop_first += first >= experts ? 1 : 0;
  }
  const auto reached = static_cast<double>(f.reached);
  f.experts_a_token = ratio(taken, reached);
  f.without_expert = ratio(alone, reached);
  f.noop_affinity = ratio(noop_affinity, reached);
  f.noop_first = ratio(noop_first, reached);
  if (!layer.chosen.empty()) {
    f.dropped = ratio(dropped, wanted - noop_wanted);
    f.noop_chosen = ratio(noop_wanted, wanted);
  }
  return f;
}

}  // namespace fathom::routes
