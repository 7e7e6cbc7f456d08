#include "train/evaluate.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "src/flops/flops.h"
#include "src/ops/loss.h"

namespace fathom {

namespace {

// The causal decision against membership, over the batches of an evaluation.
struct Hits {
  double true_positives = 0;
  double positives = 0;
  double members = 0;

  void add(const RouterSummary& s, double decisions) {
    true_positives += s.true_positives * decisions;
    positives += s.positives * decisions;
    members += s.members * decisions;
  }
  template <typename F>
  void each(const F& f) {
    f(true_positives), f(positives), f(members);
  }
  double recall() const { return members > 0 ? true_positives / members : 0; }
  double precision() const { return positives > 0 ? true_positives / positives : 0; }
};

// By routed layer.
struct LayerSums {
  double kept = 0;
  Hits hits;
};

// By layer with experts, in the causal pass.
struct ExpertSums {
  std::vector<double> taken;  // by expert
  double rows = 0;            // of the block
  double computed = 0;        // by all experts, empty slots too
  Hits hits;
};

double loss_sum(Context& c, const Transformer& model, const Batch& batch, const ForwardResult& result) {
  return ops::sum(c, model.cross_entropy(c, result.hidden, batch.targets, 1.0));
}

RouterSummary read_summary(Context& c, const Tensor& out) {
  return summary_of(to_doubles(c.backend(), out).data());
}

// What both passes over a batch say of the routers.
class Routing {
 public:
  Routing(Context& c, const Transformer& model, const RoutingConfig& routing)
      : c_(c),
        routing_(routing),
        layers_(model.routed_layers().size()),
        experts_(model.expert_layers().size()) {
    for (ExpertSums& e : experts_) e.taken.resize(static_cast<std::size_t>(routing.experts.count));
  }

  void add_trained(const ForwardResult& pass) {
    const Tensor out = c_.empty_stat({8});
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      record_summary(c_, pass.routing[i], routing_, out);
      layers_[i].hits.add(read_summary(c_, out), static_cast<double>(pass.routing[i].scores.size()));
    }
    if (!routing_.experts_choose()) return;
    for (const ExpertLayer& e : pass.experts) {
      record_summary(c_, e, routing_, out);
      experts_[static_cast<std::size_t>(e.layer)].hits.add(
          read_summary(c_, out), static_cast<double>(e.dispatch.shape.experts * e.dispatch.shape.rows));
    }
  }

  void add_served(const ForwardResult& pass) {
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      layers_[i].kept += static_cast<double>(pass.routing[i].indices.size());
    }
    for (const ExpertLayer& e : pass.experts) {  // not of a routed block that kept no token
      ExpertSums& sums = experts_[static_cast<std::size_t>(e.layer)];
      for (std::size_t i = 0; i < sums.taken.size(); ++i) {
        sums.taken[i] += static_cast<double>(e.dispatch.taken[i]);
      }
      sums.rows += static_cast<double>(e.dispatch.shape.rows);
      sums.computed += static_cast<double>(e.dispatch.shape.experts * e.dispatch.shape.slots);
    }
  }

  /// Every sum that the report is made of.
  template <typename F>
  void each(const F& f) {
    for (LayerSums& l : layers_) {
      f(l.kept);
      l.hits.each(f);
    }
    for (ExpertSums& e : experts_) {
      for (double& taken : e.taken) f(taken);
      f(e.rows), f(e.computed);
      e.hits.each(f);
    }
  }

  void report(EvalResult& result) const {
    for (const LayerSums& l : layers_) {
      result.realised_capacity.push_back(l.kept / static_cast<double>(result.tokens));
      result.recall.push_back(l.hits.recall());
      result.precision.push_back(l.hits.precision());
    }
    for (const ExpertSums& e : experts_) {
      std::vector<double> capacity = e.taken;
      for (double& x : capacity) x = e.rows > 0 ? x / e.rows : 0;
      result.expert_capacity.push_back(std::move(capacity));
      if (!routing_.experts_choose()) continue;
      result.expert_recall.push_back(e.hits.recall());
      result.expert_precision.push_back(e.hits.precision());
    }
  }

  /// Rows that the experts of each layer computed for each token of theirs.
  std::vector<double> expert_rows() const {
    std::vector<double> rows;
    for (const ExpertSums& e : experts_) rows.push_back(e.rows > 0 ? e.computed / e.rows : 0);
    return rows;
  }

 private:
  Context& c_;
  const RoutingConfig& routing_;
  std::vector<LayerSums> layers_;
  std::vector<ExpertSums> experts_;
};

}  // namespace

double EvalResult::bits_per_byte() const {
  return bytes > 0 ? judged() * static_cast<double>(tokens) / (bytes * std::numbers::ln2) : std::nan("");
}

void record_summary(Context& c, const RoutedLayer& routed, const RoutingConfig& routing, const Tensor& out) {
  const Tensor& decides = routing.has_predictor() ? routed.predicted : routed.scores;
  c.backend().routing_statistics(out, routed.scores, decides, routed.indices, logit(routing.causal.threshold),
                                 routed.scores.size());
}

void record_summary(Context& c, const ExpertLayer& layer, const RoutingConfig& routing, const Tensor& out) {
  const std::int64_t experts = layer.dispatch.shape.experts;  // what no-ops take is nowhere to be seen
  const Tensor decides = (routing.has_predictor() ? layer.predicted : layer.scores).rows(0, experts);
  c.backend().routing_statistics(out, decides, decides,
                                 layer.dispatch.chosen.rows(0, layer.dispatch.rows.size()),
                                 logit(routing.causal.threshold), decides.size());
}

RouterSummary summary_of(const double* v) { return {v[0], v[1], v[2], v[3], v[4], v[5], v[6]}; }

RouterSummary over_ranks(const std::vector<RouterSummary>& ranks) {
  RouterSummary all;
  all.min = ranks.front().min;
  all.max = ranks.front().max;
  const auto n = static_cast<double>(ranks.size());
  for (const RouterSummary& s : ranks) {
    for (double RouterSummary::*mean :
         {&RouterSummary::mean, &RouterSummary::above_half, &RouterSummary::true_positives,
          &RouterSummary::positives, &RouterSummary::members})
      all.*mean += s.*mean / n;
    all.min = std::min(all.min, s.min);
    all.max = std::max(all.max, s.max);
  }
  return all;
}

std::optional<EvalResult> evaluate(Context& c, const Transformer& model, const Config& config,
                                   const DataLoader& data, const EvalOptions& options) {
  const NoGrad no_grad(c);
  const std::int64_t wanted =
      options.tokens > 0 ? std::max<std::int64_t>(1, options.tokens / data.seq_len()) : data.sequences();
  const std::int64_t sequences = std::min(wanted, data.sequences());
  EvalResult result;
  result.layers = model.routed_layers();
  result.expert_layers = model.expert_layers();
  result.sees_future = config.routing.kind != RoutingKind::None;
  const bool causal = result.sees_future && !config.routing.needs_future();
  Routing routing(c, model, config.routing);
  SelectionRule trained_by = training_rule(config.routing, config.seed, 0);
  const std::int64_t ranks = options.ranks != nullptr ? options.ranks->size() : 1;
  const std::int64_t rank = options.ranks != nullptr ? options.ranks->rank() : 0;
  double tokens = 0, of_causal = 0;

  for (std::int64_t round = 0; round < sequences; round += ranks * options.batch) {
    if (options.stop && options.stop()) return std::nullopt;
    const std::int64_t first = round + rank * options.batch;
    if (first >= sequences) continue;  // others have the last batches
    const Batch batch = data.in_order(c, first, std::min(options.batch, sequences - first));
    tokens += static_cast<double>(batch.batch * batch.seq);
    if (auto* stochastic = std::get_if<Stochastic>(&trained_by)) stochastic->first = first;
    const ForwardResult pass = model.forward(c, batch, trained_by);
    result.loss += loss_sum(c, model, batch, pass);
    if (!causal) continue;
    routing.add_trained(pass);
    const ForwardResult served = model.forward(c, batch, causal_rule(config.routing));
    of_causal += loss_sum(c, model, batch, served);
    routing.add_served(served);
  }
  if (ranks > 1) {
    std::vector<double> sums;
    const auto each = [&](const auto& f) {
      f(tokens), f(result.loss), f(of_causal);
      routing.each(f);
    };
    each([&](double& x) { sums.push_back(x); });
    options.ranks->all_reduce_host(sums, Communicator::Reduce::Sum);
    std::size_t at = 0;
    each([&](double& x) { x = sums[at++]; });
  }

  result.tokens = static_cast<std::int64_t>(tokens);
  result.loss /= tokens;
  if (causal) {
    result.causal = of_causal / tokens;
    routing.report(result);
  }
  const TokenStore& store = data.store();
  result.bytes = static_cast<double>(store.text_bytes()) * tokens / static_cast<double>(store.num_tokens());
  std::vector<double> capacity(static_cast<std::size_t>(config.model.depth), 1.0);
  for (std::size_t i = 0; causal && i < result.layers.size(); ++i) {
    capacity[static_cast<std::size_t>(result.layers[i])] = result.realised_capacity[i];
  }
  if (causal || !result.sees_future) {
    Config measured = config;  // scores cost what these sequences are long, not those of training
    measured.train.seq_len = data.seq_len();
    result.causal_flops_per_token = causal_flops_per_token(measured, capacity, routing.expert_rows()).total();
  }
  return result;
}

}  // namespace fathom
