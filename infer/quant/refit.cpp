#include "infer/quant/refit.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>

#include <fmt/format.h>

namespace fathom {

namespace {

double share_above(const std::vector<double>& logits, double threshold) {
  const auto above =
      std::count_if(logits.begin(), logits.end(), [threshold](double l) { return l > threshold; });
  return logits.empty() ? 0.0 : static_cast<double>(above) / static_cast<double>(logits.size());
}

}  // namespace

Refit what_to_refit(const RoutingConfig& routing, const SelectionRule& rule) {
  const auto* causal = std::get_if<Causal>(&rule);
  if (causal == nullptr || !routing.looks_ahead()) return Refit::Nothing;
  return causal->logit == Causal::Logit::Predictor ? Refit::Biases : Refit::OneThreshold;
}

RefittedThreshold match_quantile(std::vector<double> logits, double share, double threshold) {
  const double least = logit(threshold);
  RefittedThreshold r{.share_before = share, .share_unfitted = share_above(logits, least)};
  const auto n = std::ssize(logits);
  const auto keep = static_cast<std::ptrdiff_t>(std::llround(share * static_cast<double>(n)));
  if (keep > 0 && keep < n) {
    const auto middle = logits.begin() + keep;
    std::nth_element(logits.begin(), middle, logits.end(), std::greater<>());
    const double last_kept = *std::min_element(logits.begin(), middle);
    r.shift = least - (last_kept + *middle) / 2;
  }
  for (double& l : logits) l += r.shift;
  r.share_after = share_above(logits, least);
  return r;
}

void DecisionCounts::add(Context& c, const ForwardResult& result) {
  for (const RoutedLayer& routed : result.routing) {
    Count& count = counts_[{routed.layer, -1}];
    count.taken += routed.indices.size();
    count.rows += routed.scores.size();
  }
  for (const ExpertLayer& layer : result.experts) {
    const std::vector<std::int32_t> rows = to_host<std::int32_t>(c.backend(), layer.dispatch.rows);
    const std::int64_t slots = layer.dispatch.shape.slots;
    for (std::int64_t e = 0; e < layer.dispatch.shape.experts; ++e) {
      Count& count = counts_[{layer.layer, e}];
      const auto first = rows.begin() + e * slots;
      count.taken += std::count_if(first, first + slots, [](std::int32_t row) { return row >= 0; });
      count.rows += layer.lse.size();
    }
  }
}

const DecisionCounts::Count* DecisionCounts::find(std::int64_t layer, std::int64_t expert) const {
  const auto found = counts_.find({layer, expert});
  return found == counts_.end() ? nullptr : &found->second;
}

double DecisionCounts::share(std::int64_t layer, std::int64_t expert) const {
  const Count* count = find(layer, expert);
  if (count == nullptr || count->rows == 0) return 0;
  return static_cast<double>(count->taken) / static_cast<double>(count->rows);
}

std::int64_t DecisionCounts::taken(std::int64_t layer, std::int64_t expert) const {
  const Count* count = find(layer, expert);
  return count != nullptr ? count->taken : 0;
}

void DecidingLogits::add(Context& c, const ForwardResult& result) {
  const auto append = [&](std::int64_t layer, std::int64_t expert, const Tensor& logits) {
    const std::vector<double> values = to_doubles(c.backend(), logits);
    std::vector<double>& all = logits_[{layer, expert}];
    all.insert(all.end(), values.begin(), values.end());
  };
  const bool predicted = of_ == Causal::Logit::Predictor;
  for (const RoutedLayer& routed : result.routing)
    append(routed.layer, -1, predicted ? routed.predicted : routed.scores);
  for (const ExpertLayer& layer : result.experts) {
    const Tensor& logits = predicted ? layer.predicted : layer.scores;
    if (!logits.defined()) continue;  // tokens choose
    for (std::int64_t e = 0; e < layer.dispatch.shape.experts; ++e)
      append(layer.layer, e, logits.rows(e, e + 1));
  }
}

std::vector<RefittedThreshold> DecidingLogits::refit(Context& c, Transformer& model, std::int64_t layer,
                                                     bool of_experts, double threshold,
                                                     const DecisionCounts& before) const {
  std::vector<RefittedThreshold> done;
  const Tensor& bias = model.parameters().master(
      fmt::format("model.layers.{}.{}router_predictor.2.bias", layer, of_experts ? "mlp." : ""));
  std::vector<double> values = to_doubles(c.backend(), bias);
  const std::int64_t first = of_experts ? 0 : -1;
  for (auto at = logits_.lower_bound({layer, first}); at != logits_.end() && at->first.first == layer; ++at) {
    const std::int64_t expert = at->first.second;
    if ((expert >= 0) != of_experts) continue;
    RefittedThreshold r = match_quantile(at->second, before.share(layer, expert), threshold);
    r.layer = layer;
    r.expert = expert;
    values[static_cast<std::size_t>(std::max<std::int64_t>(expert, 0))] += r.shift;
    done.push_back(r);
  }
  from_doubles(c.backend(), bias, values);
  return done;
}

RefittedThreshold DecidingLogits::match_all(double threshold, const DecisionCounts& before) const {
  std::vector<double> all;
  double taken = 0;
  for (const auto& [decider, logits] : logits_) {
    all.insert(all.end(), logits.begin(), logits.end());
    taken += before.share(decider.first, decider.second) * static_cast<double>(logits.size());
  }
  const double share = all.empty() ? 0 : taken / static_cast<double>(all.size());
  return match_quantile(std::move(all), share, threshold);
}

}  // namespace fathom
