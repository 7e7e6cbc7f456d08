// metrics.jsonl back into records.
#include <algorithm>

#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "train/metrics/record.h"

namespace fathom {
namespace {

using Json = nlohmann::json;

[[noreturn]] void wrong_type(const char* key, const Json& value, const char* expected) {
  throw UserError(std::string("\"") + key + "\" is " +
                  value.dump(-1, ' ', false, Json::error_handler_t::replace) + ", expected " + expected +
                  ".");
}

double number(const char* key, const Json& value) {
  if (value.is_null()) return std::nan("");
  if (!value.is_number()) wrong_type(key, value, "a number or null");
  return value.get<double>();
}

void get(const Json& json, const char* key, double& out) {
  if (const auto it = json.find(key); it != json.end()) out = number(key, *it);
}

void get(const Json& json, const char* key, std::optional<double>& out) {
  if (const auto it = json.find(key); it != json.end()) out = number(key, *it);
}

void get(const Json& json, const char* key, std::int64_t& out) {
  const auto it = json.find(key);
  if (it == json.end()) return;
  if (!it->is_number_integer()) wrong_type(key, *it, "an integer");
  out = it->get<std::int64_t>();
}

void get(const Json& json, const char* key, std::uint64_t& out) {
  const auto it = json.find(key);
  if (it == json.end()) return;
  if (!it->is_number_integer()) wrong_type(key, *it, "an integer");
  out = it->get<std::uint64_t>();
}

void get(const Json& json, const char* key, std::optional<std::int64_t>& out) {
  std::int64_t value = 0;
  if (!json.contains(key)) return;
  get(json, key, value);
  out = value;
}

void get(const Json& json, const char* key, std::string& out) {
  const auto it = json.find(key);
  if (it == json.end()) return;
  if (!it->is_string()) wrong_type(key, *it, "a string");
  out = it->get<std::string>();
}

std::vector<double> numbers(const char* key, const Json& values) {
  if (!values.is_array()) wrong_type(key, values, "a list of numbers");
  std::vector<double> out;
  for (const Json& value : values) out.push_back(number(key, value));
  return out;
}

void get(const Json& json, const char* key, std::vector<double>& out) {
  if (const auto it = json.find(key); it != json.end()) out = numbers(key, *it);
}

void get(const Json& json, const char* key, std::vector<std::vector<double>>& out) {
  const auto it = json.find(key);
  if (it == json.end()) return;
  if (!it->is_array()) wrong_type(key, *it, "a list of lists of numbers");
  for (const Json& values : *it) out.push_back(numbers(key, values));
}

void get(const Json& json, const char* key, std::vector<std::int64_t>& out) {
  const auto it = json.find(key);
  if (it == json.end()) return;
  if (!it->is_array()) wrong_type(key, *it, "a list of integers");
  for (const Json& value : *it) {
    if (!value.is_number_integer()) wrong_type(key, value, "an integer");
    out.push_back(value.get<std::int64_t>());
  }
}

StepRecord parse_step(const Json& json) {
  StepRecord r;
  get(json, "step", r.step);
  get(json, "tokens", r.tokens);
  get(json, "flops", r.flops);
  get(json, "loss", r.loss);
  get(json, "loss_average", r.loss_average);
  get(json, "lr", r.lr);
  get(json, "grad_norm", r.grad_norm);
  get(json, "tokens_per_s", r.tokens_per_s);
  get(json, "flops_per_s", r.flops_per_s);
  get(json, "mfu", r.mfu);
  get(json, "seconds", r.seconds);
  get(json, "memory_bytes", r.memory_bytes);
  get(json, "memory_held_bytes", r.memory_held_bytes);
  get(json, "device_used_bytes", r.device_used_bytes);
  get(json, "aux_loss", r.aux_loss);
  get(json, "predictor_loss", r.predictor_loss);
  get(json, "balance_loss", r.balance_loss);
  get(json, "z_loss", r.z_loss);
  get(json, "predictor_accuracy", r.predictor_accuracy);
  get(json, "expert_aux_loss", r.expert_aux_loss);
  get(json, "expert_predictor_loss", r.expert_predictor_loss);
  get(json, "expert_accuracy", r.expert_accuracy);
  get(json, "routed_layers", r.routed_layers);
  get(json, "routed_fraction", r.routed_fraction);
  std::vector<double> mean, min, max, above_half;
  get(json, "router_mean", mean);
  get(json, "router_min", min);
  get(json, "router_max", max);
  get(json, "router_above_half", above_half);
  const std::size_t layers = std::min({mean.size(), min.size(), max.size(), above_half.size()});
  for (std::size_t i = 0; i < layers; ++i) r.router.push_back({mean[i], min[i], max[i], above_half[i]});
  get(json, "expert_layers", r.expert_layers);
  for (const auto& [key, member] : kExpertKeys) {
    std::vector<double> values;
    get(json, key, values);
    if (r.experts.size() < values.size()) r.experts.resize(values.size());
    for (std::size_t i = 0; i < values.size(); ++i) r.experts[i].*member = values[i];
  }
  return r;
}

EvalRecord parse_eval(const Json& json) {
  EvalRecord r;
  get(json, "step", r.step);
  get(json, "tokens", r.tokens);
  get(json, "flops", r.flops);
  get(json, "seconds", r.seconds);
  get(json, "val_loss", r.val_loss);
  get(json, "val_topk", r.val_topk);
  get(json, "val_causal", r.val_causal);
  get(json, "bits_per_byte", r.bits_per_byte);
  get(json, "routed_layers", r.routed_layers);
  get(json, "realised_capacity", r.realised_capacity);
  get(json, "router_recall", r.router_recall);
  get(json, "router_precision", r.router_precision);
  get(json, "router_recall_by_layer", r.router_recall_by_layer);
  get(json, "router_precision_by_layer", r.router_precision_by_layer);
  get(json, "expert_layers", r.expert_layers);
  get(json, "expert_capacity", r.expert_capacity);
  get(json, "expert_recall", r.expert_recall);
  get(json, "expert_precision", r.expert_precision);
  get(json, "expert_recall_by_layer", r.expert_recall_by_layer);
  get(json, "expert_precision_by_layer", r.expert_precision_by_layer);
  get(json, "causal_flops_per_token", r.causal_flops_per_token);
  return r;
}

RunFacts parse_facts(const Json& json) {
  RunFacts f;
  get(json, "params_total", f.params_total);
  get(json, "params_active", f.params_active);
  get(json, "flops_per_token_forward", f.flops_per_token_forward);
  get(json, "flops_per_token_train", f.flops_per_token_train);
  get(json, "total_steps", f.total_steps);
  get(json, "batch_tokens", f.batch_tokens);
  get(json, "seq_len", f.seq_len);
  get(json, "depth", f.depth);
  get(json, "routed_layers", f.routed_layers);
  get(json, "capacity", f.capacity);
  get(json, "train_store_tokens", f.train_store_tokens);
  get(json, "tokenizer_hash", f.tokenizer_hash);
  get(json, "valid_source_hash", f.valid_source_hash);
  get(json, "seed", f.seed);
  get(json, "device", f.device);
  get(json, "git_sha", f.git_sha);
  return f;
}

// An event of a newer version is not an error, it is just not known here.
AnyRecord parse_event(const Json& json) {
  std::string kind, status;
  get(json, "event", kind);
  get(json, "status", status);
  EventRecord r;
  bool known = false;
  for (const EventKind k : {EventKind::Start, EventKind::Resume, EventKind::Spike, EventKind::Nan,
                            EventKind::Checkpoint, EventKind::Stop, EventKind::End}) {
    if (kind != name_of(k)) continue;
    r.kind = k;
    known = true;
  }
  if (!known) return {};
  for (const RunStatus s : {RunStatus::Done, RunStatus::Stopped, RunStatus::Failed}) {
    if (status == name_of(s)) r.status = s;
  }
  get(json, "step", r.step);
  get(json, "seconds", r.seconds);
  get(json, "tokens", r.tokens);
  get(json, "flops", r.flops);
  get(json, "final_loss", r.final_loss);
  get(json, "best_val_loss", r.best_val_loss);
  get(json, "best_step", r.best_step);
  get(json, "checkpoint", r.checkpoint);
  get(json, "message", r.message);
  get(json, "time", r.time);
  if (json.contains("params_total")) r.facts = parse_facts(json);
  return r;
}

}  // namespace

AnyRecord parse_record(std::string_view line) {
  const Json json = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) throw UserError("it is not valid JSON.");
  if (!json.is_object()) throw UserError("it is not a JSON object.");
  if (json.contains("event")) return parse_event(json);
  if (json.contains("val_loss") || json.contains("val_topk") || json.contains("val_causal")) {
    return parse_eval(json);
  }
  if (json.contains("loss")) return parse_step(json);
  return {};
}

}  // namespace fathom
