#include "train/evaluate.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "src/flops/flops.h"
#include "src/ops/loss.h"

namespace fathom {

namespace {

// Sums by routed layer over the batches of an evaluation.
struct LayerSums {
  double kept = 0;
  double true_positives = 0;
  double positives = 0;
  double members = 0;
};

double loss_sum(Context& c, const Transformer& model, const Batch& batch, const ForwardResult& result) {
  return ops::sum(c, model.cross_entropy(c, result.hidden, batch.targets, 1.0));
}

}  // namespace

double EvalResult::bits_per_byte() const {
  return bytes > 0 ? judged() * static_cast<double>(tokens) / (bytes * std::numbers::ln2) : std::nan("");
}

void record_summary(Context& c, const RoutedLayer& routed, const RoutingConfig& routing, const Tensor& out) {
  const Tensor& decides = routing.has_predictor() ? routed.predicted : routed.scores;
  c.backend().routing_statistics(out, routed.scores, decides, routed.indices, logit(routing.causal.threshold),
                                 routed.scores.size());
}

RouterSummary summary_of(const double* v) { return {v[0], v[1], v[2], v[3], v[4], v[5], v[6]}; }

RouterSummary summarise(Context& c, const RoutedLayer& routed, const RoutingConfig& routing) {
  const Tensor out = c.empty_stat({8});
  record_summary(c, routed, routing, out);
  return summary_of(to_doubles(c.backend(), out).data());
}

std::optional<EvalResult> evaluate(Context& c, const Transformer& model, const Config& config,
                                   const DataLoader& data, const EvalOptions& options) {
  const NoGrad no_grad(c);
  const std::int64_t wanted =
      options.tokens > 0 ? std::max<std::int64_t>(1, options.tokens / data.seq_len()) : data.sequences();
  const std::int64_t sequences = std::min(wanted, data.sequences());
  EvalResult result;
  result.layers = model.routed_layers();
  result.sees_future = config.routing.kind != RoutingKind::None;
  const bool causal = result.sees_future && !config.routing.needs_future();
  std::vector<LayerSums> layers(result.layers.size());
  const SelectionRule trained_by = training_rule(config.routing, config.seed, 0);

  for (std::int64_t first = 0; first < sequences; first += options.batch) {
    if (options.stop && options.stop()) return std::nullopt;
    const Batch batch = data.in_order(c, first, std::min(options.batch, sequences - first));
    result.tokens += batch.batch * batch.seq;
    const ForwardResult pass = model.forward(c, batch, trained_by);
    result.loss += loss_sum(c, model, batch, pass);
    if (!causal) continue;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const RouterSummary s = summarise(c, pass.routing[i], config.routing);
      const double rows = static_cast<double>(batch.batch * batch.seq);
      layers[i].true_positives += s.true_positives * rows;
      layers[i].positives += s.positives * rows;
      layers[i].members += s.members * rows;
    }
    const ForwardResult served = model.forward(c, batch, causal_rule(config.routing));
    result.causal = result.causal.value_or(0) + loss_sum(c, model, batch, served);
    for (std::size_t i = 0; i < layers.size(); ++i) {
      layers[i].kept += static_cast<double>(served.routing[i].indices.size());
    }
  }

  const double tokens = static_cast<double>(result.tokens);
  result.loss /= tokens;
  if (causal) result.causal = *result.causal / tokens;
  const TokenStore& store = data.store();
  result.bytes = static_cast<double>(store.text_bytes()) * tokens / static_cast<double>(store.num_tokens());
  std::vector<double> capacity(static_cast<std::size_t>(config.model.depth), 1.0);
  for (std::size_t i = 0; causal && i < layers.size(); ++i) {
    result.realised_capacity.push_back(layers[i].kept / tokens);
    result.recall.push_back(layers[i].members > 0 ? layers[i].true_positives / layers[i].members : 0);
    result.precision.push_back(layers[i].positives > 0 ? layers[i].true_positives / layers[i].positives : 0);
    capacity[static_cast<std::size_t>(result.layers[i])] = result.realised_capacity.back();
  }
  // What a token's own choice of experts costs depends on how they are served.
  if (!config.routing.has_experts() && (causal || !result.sees_future)) {
    Config measured = config;  // scores cost what these sequences are long, not those of training
    measured.train.seq_len = data.seq_len();
    result.causal_flops_per_token = causal_flops_per_token(measured, capacity).total();
  }
  return result;
}

}  // namespace fathom
