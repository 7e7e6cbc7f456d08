// Evaluation on a fixed slice of a store, always by the rule that trained the model and by the one that can
// serve it.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "src/config/config.h"
#include "src/model/transformer.h"
#include "train/comm/communicator.h"
#include "train/data_loader.h"

namespace fathom {

struct EvalOptions {
  std::int64_t tokens =
      65536;               // the slice: this many from the store's start, in whole sequences; 0: all of it
  std::int64_t batch = 8;  // sequences at a time
  std::function<bool()> stop;  // polled between batches; true ends the evaluation without a result
  /// Not null: the ranks take the batches in turn, and all have the result. `stop` then says the same to all
  /// of them.
  Communicator* ranks = nullptr;
};

struct EvalResult {
  std::int64_t tokens = 0;
  double bytes = 0;              // of text behind these tokens, from the store's average; 0 if it is unknown
  double loss = 0;               // nats a token, routed as in training
  bool sees_future = false;      // whether that routing looks at whole sequences
  std::optional<double> causal;  // nats a token, each token routed by itself alone
  // By routed layer, in the causal pass; recall and precision hold the causal decision against top-k in the
  // top-k pass.
  std::vector<std::int64_t> layers;
  std::vector<double> realised_capacity;
  std::vector<double> recall;
  std::vector<double> precision;
  // By layer with experts. Capacity, by expert: the share of the block's tokens that it took in the causal
  // pass. Recall and precision, where experts choose: of what they took against top-k in the top-k pass.
  std::vector<std::int64_t> expert_layers;
  std::vector<std::vector<double>> expert_capacity;
  std::vector<double> expert_recall;
  std::vector<double> expert_precision;
  double causal_flops_per_token = 0;  // forward, from the realised capacity and what the experts computed

  /// The loss that can be served.
  double judged() const { return causal.value_or(loss); }
  double bits_per_byte() const;
};

/// Empty only when options.stop ended it. The model must be of `config`.
std::optional<EvalResult> evaluate(Context& c, const Transformer& model, const Config& config,
                                   const DataLoader& data, const EvalOptions& options);

/// How a routed layer behaved over a batch (kernels/backend.h, routing_statistics), or the experts of a layer
/// together, a decision being one expert's of one token.
struct RouterSummary {
  double mean = 0, min = 0, max = 0;
  double above_half = 0;  // share of tokens with sigma(r) > 0.5
  double true_positives = 0, positives = 0,
         members = 0;  // of the causal decision against membership; shares of tokens
  /// Share of tokens where the causal decision is the membership.
  double accuracy() const { return 1.0 - (positives - true_positives) - (members - true_positives); }
};
/// Into stat [8], without waiting for the device.
void record_summary(Context& c, const RoutedLayer& routed, const RoutingConfig& routing, const Tensor& out);
/// Of experts that choose.
void record_summary(Context& c, const ExpertLayer& layer, const RoutingConfig& routing, const Tensor& out);
RouterSummary summary_of(const double* values);
/// Of ranks that saw as many tokens.
RouterSummary over_ranks(const std::vector<RouterSummary>& ranks);

}  // namespace fathom
