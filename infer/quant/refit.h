// Thresholds of a causal rule after a model's weights have changed: a router's or predictor's logits have
// moved, so that another share of the tokens is above the threshold, which stands in the config once for all
// layers. The bias of each layer's (or expert's) predictor is shifted such that the share becomes what it
// was, by matching quantiles: of n logits l, the shift is
//
//   logit(threshold) - (l_(k) + l_(k+1)) / 2,   l_(k) the k-th largest, k the share of n that was kept.
//
// A router that decides by its own logit has no bias. There the config's threshold itself is fitted, for all
// layers and experts together: the share of all their decisions becomes what it was, that of one need not.
#pragma once

#include <cstdint>
#include <map>
#include <utility>
#include <vector>

#include "src/model/transformer.h"

namespace fathom {

struct RefittedThreshold {
  std::int64_t layer = 0;    // -1: all together, by the config's threshold
  std::int64_t expert = -1;  // -1: of a routed block
  double share_before = 0;   // of the tokens that it decides about, in the model that was quantized
  double share_unfitted = 0;
  double share_after = 0;
  double shift = 0;  // of the predictor's bias; taken from the logit of the config's threshold
};

/// What there is to fit.
enum class Refit : std::uint8_t {
  Nothing,      // no decision is made by a threshold
  Biases,       // of predictors
  OneThreshold  // of the config
};
Refit what_to_refit(const RoutingConfig& routing, const SelectionRule& rule);

/// The shift for n logits. `share` 0 or 1 is met by no quantile: a shift of 0.
RefittedThreshold match_quantile(std::vector<double> logits, double share, double threshold);

/// What a model decides: by routed layer, and by layer of experts and expert, rows taken of rows decided
/// about.
class DecisionCounts {
 public:
  void add(Context& c, const ForwardResult& result);
  /// Of a routed block, or with `expert` of an expert's choice; 0 where nothing was decided.
  double share(std::int64_t layer, std::int64_t expert = -1) const;
  std::int64_t taken(std::int64_t layer, std::int64_t expert = -1) const;

 private:
  struct Count {
    std::int64_t taken = 0, rows = 0;
  };
  const Count* find(std::int64_t layer, std::int64_t expert) const;
  std::map<std::pair<std::int64_t, std::int64_t>, Count> counts_;
};

/// The logits that decide, over many batches.
class DecidingLogits {
 public:
  explicit DecidingLogits(Causal::Logit of) : of_(of) {}
  void add(Context& c, const ForwardResult& result);
  /// Shifts the biases of `layer`, of its experts where `of_experts`, else of the block.
  std::vector<RefittedThreshold> refit(Context& c, Transformer& model, std::int64_t layer, bool of_experts,
                                       double threshold, const DecisionCounts& before) const;
  /// Of all layers and experts together; its shift is to be taken from the threshold's logit.
  RefittedThreshold match_all(double threshold, const DecisionCounts& before) const;

 private:
  Causal::Logit of_;
  std::map<std::pair<std::int64_t, std::int64_t>, std::vector<double>> logits_;
};

}  // namespace fathom
