#include "train/records.h"

#include <numeric>
#include <utility>

#include "src/flops/flops.h"

namespace fathom {

namespace {

double mean(const std::vector<double>& values) {
  const auto n = static_cast<double>(values.size());
  return std::accumulate(values.begin(), values.end(), 0.0,
                         [n](double sum, double x) { return sum + x / n; });
}

}  // namespace

RunFacts facts_of(const TrainingInputs& inputs, const std::vector<std::int64_t>& routed_layers,
                  std::string device, std::string git_sha) {
  const Config& config = inputs.config;
  RunFacts facts;
  const ParameterCount count = count_parameters(config);
  facts.params_total = count.total;
  facts.params_active = count.active;
  facts.flops_per_token_forward = forward_flops_per_token(config).total();
  facts.flops_per_token_train = train_flops_per_token(config).total();
  facts.total_steps = plan_horizon(config).steps;
  facts.batch_tokens = config.train.batch_tokens;
  facts.seq_len = config.train.seq_len;
  facts.depth = config.model.depth;
  facts.routed_layers = routed_layers;
  if (!routed_layers.empty()) facts.capacity = config.routing.capacity;
  facts.train_store_tokens = inputs.train->num_tokens();
  facts.tokenizer_hash = inputs.train->tokenizer_hash();
  if (inputs.valid) facts.valid_source_hash = inputs.valid->source_hash();
  facts.seed = config.seed;
  facts.device = std::move(device);
  facts.git_sha = std::move(git_sha);
  return facts;
}

StepRecord step_record(const Config& config, const TrainingState& state, const StepOutcome& outcome,
                       const StepPace& pace, const std::vector<std::int64_t>& routed_layers) {
  StepRecord r;
  r.step = state.step;
  r.tokens = state.tokens;
  r.flops = state.flops;
  r.loss = outcome.loss;
  r.loss_average = state.loss_average;
  r.lr = pace.lr;
  r.grad_norm = outcome.norms.model;
  r.tokens_per_s = static_cast<double>(pace.steps * config.train.batch_tokens) / pace.seconds;
  r.flops_per_s = static_cast<double>(pace.steps) * train_flops_per_step(config) / pace.seconds;
  if (pace.peak_flops_per_s > 0) r.mfu = r.flops_per_s / pace.peak_flops_per_s;
  r.seconds = state.seconds;
  r.memory_bytes = pace.memory_bytes;
  r.memory_held_bytes = pace.memory_held_bytes;
  if (pace.device_used_bytes > 0) r.device_used_bytes = pace.device_used_bytes;
  const RoutingConfig& routing = config.routing;
  if (routing.routes_depth() && routing.has_aux_loss()) r.aux_loss = outcome.aux;
  if (routing.routes_depth() && routing.has_predictor()) r.predictor_loss = outcome.predictor;
  if (routing.experts_choose() && routing.has_aux_loss()) r.expert_aux_loss = outcome.expert_aux;
  if (routing.experts_choose() && routing.has_predictor()) r.expert_predictor_loss = outcome.expert_predictor;
  if (routing.tokens_choose()) {
    r.balance_loss = outcome.balance;
    r.z_loss = outcome.z;
  }
  r.routed_layers = routed_layers;
  std::vector<double> accuracy;
  for (const RouterSummary& s : outcome.routing) {
    r.routed_fraction.push_back(s.members);
    r.router.push_back({s.mean, s.min, s.max, s.above_half});
    accuracy.push_back(s.accuracy());
  }
  r.experts = outcome.experts;
  for (std::size_t i = 0; i < r.experts.size(); ++i) r.expert_layers.push_back(static_cast<std::int64_t>(i));
  if (!accuracy.empty() && routing.causal.method != CausalMethod::None) r.predictor_accuracy = mean(accuracy);
  accuracy.clear();
  for (const RouterSummary& s : outcome.expert_routing) accuracy.push_back(s.accuracy());
  if (!accuracy.empty()) r.expert_accuracy = mean(accuracy);
  return r;
}

EvalRecord evaluation_record(const TrainingState& state, const EvalResult& result) {
  EvalRecord r;
  r.step = state.step;
  r.tokens = state.tokens;
  r.flops = state.flops;
  r.seconds = state.seconds;
  if (!result.sees_future) {
    r.val_loss = result.loss;
  } else {
    r.val_topk = result.loss;
    r.val_causal = result.causal;
  }
  if (result.bytes > 0) r.bits_per_byte = result.bits_per_byte();
  if (result.causal && !result.layers.empty()) {
    r.routed_layers = result.layers;
    r.realised_capacity = result.realised_capacity;
    r.router_recall_by_layer = result.recall;
    r.router_precision_by_layer = result.precision;
    r.router_recall = mean(result.recall);
    r.router_precision = mean(result.precision);
  }
  if (result.causal && !result.expert_layers.empty()) {
    r.expert_layers = result.expert_layers;
    r.expert_capacity = result.expert_capacity;
    r.expert_recall_by_layer = result.expert_recall;
    r.expert_precision_by_layer = result.expert_precision;
    if (!result.expert_recall.empty()) {
      r.expert_recall = mean(result.expert_recall);
      r.expert_precision = mean(result.expert_precision);
    }
  }
  if (result.causal_flops_per_token > 0) r.causal_flops_per_token = result.causal_flops_per_token;
  return r;
}

EventRecord event_at(const TrainingState& state, EventKind kind, std::string message) {
  EventRecord record;
  record.kind = kind;
  record.step = state.step;
  record.seconds = state.seconds;
  record.message = std::move(message);
  return record;
}

EventRecord end_record(const TrainingState& state, RunStatus status, std::string message) {
  EventRecord record = event_at(state, EventKind::End, std::move(message));
  record.status = status;
  record.tokens = state.tokens;
  record.flops = state.flops;
  record.final_loss = state.loss_average;
  if (state.best_step > 0) {
    record.best_val_loss = state.best_val_loss;
    record.best_step = state.best_step;
  }
  return record;
}

}  // namespace fathom
