#include "train/metrics/record.h"

#include <nlohmann/json.hpp>

namespace fathom {
namespace {

using Json = nlohmann::ordered_json;  // keys stay in the order of the record

// nlohmann writes a double that is not finite as null, which is what docs/runs.md promises.
template <typename T>
void put(Json& json, const char* key, const std::optional<T>& value) {
  if (value) json[key] = *value;
}

void put(Json& json, const char* key, const std::vector<double>& values) {
  if (!values.empty()) json[key] = values;
}

void put(Json& json, const char* key, const std::vector<std::vector<double>>& values) {
  if (!values.empty()) json[key] = values;
}

void put(Json& json, const char* key, const std::vector<std::int64_t>& values) {
  if (!values.empty()) json[key] = values;
}

void put(Json& json, const char* key, const std::string& value) {
  if (!value.empty()) json[key] = value;
}

void put_experts(Json& json, const std::vector<ExpertStats>& experts) {
  for (const auto& [key, member] : kExpertKeys) {
    std::vector<double> values;
    for (const ExpertStats& e : experts) values.push_back(e.*member);
    put(json, key, values);
  }
}

void put_router(Json& json, const std::vector<RouterStats>& router) {
  if (router.empty()) return;
  for (const RouterStats& r : router) {
    json["router_mean"].push_back(r.mean);
    json["router_min"].push_back(r.min);
    json["router_max"].push_back(r.max);
    json["router_above_half"].push_back(r.above_half);
  }
}

void put_facts(Json& json, const RunFacts& f) {
  json["params_total"] = f.params_total;
  json["params_active"] = f.params_active;
  json["flops_per_token_forward"] = f.flops_per_token_forward;
  json["flops_per_token_train"] = f.flops_per_token_train;
  json["total_steps"] = f.total_steps;
  json["batch_tokens"] = f.batch_tokens;
  json["seq_len"] = f.seq_len;
  json["depth"] = f.depth;
  put(json, "routed_layers", f.routed_layers);
  put(json, "capacity", f.capacity);
  json["train_store_tokens"] = f.train_store_tokens;
  put(json, "tokenizer_hash", f.tokenizer_hash);
  put(json, "valid_source_hash", f.valid_source_hash);
  json["seed"] = f.seed;
  put(json, "device", f.device);
  put(json, "git_sha", f.git_sha);
}

// Text from outside (paths, error messages) may hold invalid UTF-8; the line must stay valid JSON all the
// same.
std::string dump(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

}  // namespace

const char* name_of(EventKind kind) {
  switch (kind) {
    case EventKind::Start:
      return "start";
    case EventKind::Resume:
      return "resume";
    case EventKind::Spike:
      return "spike";
    case EventKind::Nan:
      return "nan";
    case EventKind::Checkpoint:
      return "checkpoint";
    case EventKind::Stop:
      return "stop";
    case EventKind::End:
      return "end";
  }
  return "?";
}

const char* name_of(RunStatus status) {
  switch (status) {
    case RunStatus::Done:
      return "done";
    case RunStatus::Stopped:
      return "stopped";
    case RunStatus::Failed:
      return "failed";
  }
  return "?";
}

std::string to_json_line(const StepRecord& r) {
  Json json;
  json["step"] = r.step;
  json["tokens"] = r.tokens;
  json["flops"] = r.flops;
  json["loss"] = r.loss;
  put(json, "loss_average", r.loss_average);
  json["lr"] = r.lr;
  json["grad_norm"] = r.grad_norm;
  json["tokens_per_s"] = r.tokens_per_s;
  json["flops_per_s"] = r.flops_per_s;
  put(json, "mfu", r.mfu);
  json["seconds"] = r.seconds;
  put(json, "memory_bytes", r.memory_bytes);
  put(json, "memory_held_bytes", r.memory_held_bytes);
  put(json, "device_used_bytes", r.device_used_bytes);
  put(json, "aux_loss", r.aux_loss);
  put(json, "predictor_loss", r.predictor_loss);
  put(json, "balance_loss", r.balance_loss);
  put(json, "z_loss", r.z_loss);
  put(json, "predictor_accuracy", r.predictor_accuracy);
  put(json, "expert_aux_loss", r.expert_aux_loss);
  put(json, "expert_predictor_loss", r.expert_predictor_loss);
  put(json, "expert_accuracy", r.expert_accuracy);
  put(json, "routed_layers", r.routed_layers);
  put(json, "routed_fraction", r.routed_fraction);
  put_router(json, r.router);
  put(json, "expert_layers", r.expert_layers);
  put_experts(json, r.experts);
  return dump(json);
}

std::string to_json_line(const EvalRecord& r) {
  Json json;
  json["step"] = r.step;
  json["tokens"] = r.tokens;
  json["flops"] = r.flops;
  json["seconds"] = r.seconds;
  put(json, "val_loss", r.val_loss);
  put(json, "val_topk", r.val_topk);
  put(json, "val_causal", r.val_causal);
  put(json, "bits_per_byte", r.bits_per_byte);
  put(json, "routed_layers", r.routed_layers);
  put(json, "realised_capacity", r.realised_capacity);
  put(json, "router_recall", r.router_recall);
  put(json, "router_precision", r.router_precision);
  put(json, "router_recall_by_layer", r.router_recall_by_layer);
  put(json, "router_precision_by_layer", r.router_precision_by_layer);
  put(json, "expert_layers", r.expert_layers);
  put(json, "expert_capacity", r.expert_capacity);
  put(json, "expert_recall", r.expert_recall);
  put(json, "expert_precision", r.expert_precision);
  put(json, "expert_recall_by_layer", r.expert_recall_by_layer);
  put(json, "expert_precision_by_layer", r.expert_precision_by_layer);
  put(json, "causal_flops_per_token", r.causal_flops_per_token);
  return dump(json);
}

std::string to_json_line(const EventRecord& r) {
  Json json;
  json["event"] = name_of(r.kind);
  if (r.status) json["status"] = name_of(*r.status);
  json["step"] = r.step;
  if (r.kind == EventKind::End) json["steps"] = r.step;
  json["seconds"] = r.seconds;
  put(json, "tokens", r.tokens);
  put(json, "flops", r.flops);
  put(json, "final_loss", r.final_loss);
  put(json, "best_val_loss", r.best_val_loss);
  put(json, "best_step", r.best_step);
  put(json, "checkpoint", r.checkpoint);
  if (r.facts) put_facts(json, *r.facts);
  put(json, "message", r.message);
  put(json, "time", r.time);
  return dump(json);
}

}  // namespace fathom
