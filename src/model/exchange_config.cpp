#include "src/model/exchange_config.h"

#include <array>
#include <string_view>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "src/config/keys.h"
#include "src/config/names.h"
#include "src/config/parse.h"
#include "src/config/print.h"
#include "src/config/resolve.h"
#include "src/model/quantization_config.h"

namespace fathom {

namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kOurs = "fathom";
constexpr const char* kRouting = "fathom_routing";
constexpr const char* kQuantization = "quantization_config";
constexpr int kVersion = 1;

// The keys of these sections, as JSON.
Json section_of(const Config& config, std::string_view section) {
  Json json = Json::object();
  for (const Key& key : config_keys()) {
    const std::string_view of = key.section();
    if (of != section && !(of.starts_with(section) && of[section.size()] == '.')) continue;
    const std::string text = key.print(config);
    Json value = Json::parse(text, nullptr, false);
    Json* place = &json;
    if (of.size() > section.size()) place = &json[std::string(of.substr(section.size() + 1))];
    (*place)[std::string(key.leaf())] = value.is_discarded() ? Json(text) : std::move(value);
  }
  return json;
}

// The standard names of what ModelConfig holds.
struct Named {
  const char* theirs;
  const char* ours;
};
constexpr std::array<Named, 8> kNames = {{{"vocab_size", "vocab_size"},
                                          {"hidden_size", "width"},
                                          {"num_hidden_layers", "depth"},
                                          {"num_attention_heads", "heads"},
                                          {"num_key_value_heads", "kv_heads"},
                                          {"intermediate_size", "ffn_hidden"},
                                          {"max_position_embeddings", "max_seq_len"},
                                          {"rms_norm_eps", "norm_eps"}}};
// Of rope_scaling; linear scaling has the first alone.
constexpr std::array<Named, 4> kScalingNames = {
    {{"factor", "factor"},
     {"low_freq_factor", "low_freq_factor"},
     {"high_freq_factor", "high_freq_factor"},
     {"original_max_position_embeddings", "original_max_seq_len"}}};

Json bos_of(const TextEnds& ends) { return ends.bos < 0 ? Json(nullptr) : Json(ends.bos); }

// One id, or a list of several.
Json stops_of(const TextEnds& ends) {
  if (ends.stops.empty()) return nullptr;
  return ends.stops.size() == 1 ? Json(ends.stops[0]) : Json(ends.stops);
}

Json scaling_of(const RopeScaling& s) {
  if (s.kind == RopeScalingKind::None) return nullptr;
  Json json = {{"rope_type", name_of(s.kind)}, {"factor", s.factor}};
  if (s.kind == RopeScalingKind::Llama3) {
    json["low_freq_factor"] = s.low_freq_factor;
    json["high_freq_factor"] = s.high_freq_factor;
    json["original_max_position_embeddings"] = s.original_max_seq_len;
  }
  return json;
}

class Reader {
 public:
  Reader(const Json& json, const std::string& path) : json_(json), path_(path) {}

  ExchangeConfig read() const {
    if (!json_.is_object()) throw UserError(fmt::format("{} is no JSON object.", path_));
    const std::string type = text("model_type");
    if (type != "llama" && type != "qwen3" && type != kOurs) {
      refuse(fmt::format("model_type is {}", type), "Llama, Qwen3 and Fathom's own models");
    }
    require("hidden_act", "silu");
    require("attention_bias", false);
    require("mlp_bias", false);
    require("use_sliding_window", false);
    require("partial_rotary_factor", 1.0);
    Json model = Json::object();
    for (const Named& name : kNames) model[name.ours] = number(name.theirs, name.theirs == kNames[4].theirs);
    read_rope(model);
    model["tie_embeddings"] =
        json_.contains("tie_word_embeddings") ? json_["tie_word_embeddings"] : Json(false);
    model["qk_norm"] = type == "qwen3";
    model["head_dim"] = head_dim(type, model);
    const Json own = json_.contains(kOurs) && json_[kOurs].is_object() ? json_[kOurs] : Json::object();
    // A config is one of a training; these say nothing of the model.
    const Json length = model["max_seq_len"];
    Json ours = {{"data", {{"train", "none"}}},
                 {"train", {{"steps", 1}, {"seq_len", length}, {"batch_tokens", length}}}};
    if (type == kOurs || !own.empty()) require_version(own);
    if (type == kOurs) {
      if (own.contains("qk_norm")) model["qk_norm"] = own["qk_norm"];
      if (!json_.contains(kRouting) || !json_[kRouting].is_object()) {
        throw UserError(
            fmt::format("{} is of a routed model and has no {}, which says how it routes.", path_, kRouting),
            "Export the model again.");
      }
      ours["routing"] = json_[kRouting];
      if (ours["routing"].contains("experts")) ours["experts"] = ours["routing"]["experts"];
      ours["routing"].erase("experts");
    }
    ours["model"] = std::move(model);
    ExchangeConfig read;
    read.config = resolve(parse_config(ours.dump(), path_));
    read.config.data.train.clear();
    read.is_ours = !own.empty();
    read.meta.config_yaml = to_yaml(read.config);
    if (read.is_ours) read_meta(own, read.meta);
    const auto quantization = json_.find(kQuantization);
    if (quantization != json_.end() && !quantization->is_null())
      read.quantization = parse_quantization(quantization->dump(), path_);
    return read;
  }

 private:
  [[noreturn]] void refuse(const std::string& what, const std::string& known) const {
    throw UserError(fmt::format("{}: {}, which Fathom does not compute; it knows {}.", path_, what, known));
  }

  std::string text(const char* key) const {
    const auto found = json_.find(key);
    if (found == json_.end() || !found->is_string()) {
      throw UserError(fmt::format("{} has no {}, so it is no config of a model.", path_, key));
    }
    return found->get<std::string>();
  }

  Json number(const char* key, bool may_lack) const {
    const auto found = json_.find(key);
    if (found != json_.end() && found->is_number()) return *found;
    if (may_lack && found == json_.end()) return 0;  // as many as heads
    throw UserError(fmt::format("{} has no {}, which is to be a number.", path_, key));
  }

  // A feature that is there only with this value.
  void require(const char* key, const Json& only) const {
    const auto found = json_.find(key);
    if (found == json_.end() || found->is_null() || *found == only) return;
    refuse(fmt::format("{} is {}", key, found->dump()), only.dump());
  }

  // rope_theta and rope_scaling. They stood apart until version 4 of transformers, and are both in
  // rope_parameters since.
  void read_rope(Json& model) const {
    model["rope_theta"] = json_.contains("rope_theta") ? json_["rope_theta"] : Json(10000.0);
    for (const char* key : {"rope_scaling", "rope_parameters"}) {
      const auto found = json_.find(key);
      if (found == json_.end() || !found->is_object()) continue;
      model["rope_theta"] = found->value("rope_theta", model["rope_theta"]);
      if (found->value("partial_rotary_factor", 1.0) != 1.0) {
        refuse(fmt::format("{} has a partial_rotary_factor of {}", key,
                           (*found)["partial_rotary_factor"].dump()),
               "1");
      }
      const std::string kind = found->value("rope_type", found->value("type", std::string("default")));
      if (kind != "default") model["rope_scaling"] = rope_scaling(key, *found, kind);
    }
  }

  Json rope_scaling(const char* key, const Json& theirs, const std::string& kind) const {
    if (kind != name_of(RopeScalingKind::Linear) && kind != name_of(RopeScalingKind::Llama3)) {
      refuse(fmt::format("{} has the type {}", key, kind), "default, linear and llama3");
    }
    Json ours = {{"kind", kind}};
    for (const Named& name : kScalingNames) {
      const auto found = theirs.find(name.theirs);
      if (found == theirs.end() || !found->is_number()) {
        throw UserError(fmt::format("{}: {} of the type {} has no {}, which is to be a number.", path_, key,
                                    kind, name.theirs));
      }
      ours[name.ours] = *found;
      if (kind == name_of(RopeScalingKind::Linear)) break;  // the factor is all
    }
    return ours;
  }

  // 0: the width's share. Where it is missing, it is what transformers takes.
  Json head_dim(const std::string& type, const Json& model) const {
    constexpr int kOfQwen3 = 128;
    const auto found = json_.find("head_dim");
    if (found == json_.end() || found->is_null()) return type == "qwen3" ? kOfQwen3 : 0;
    const bool share = found->is_number() && model["heads"].is_number() && model["width"].is_number() &&
                       found->get<double>() * model["heads"].get<double>() == model["width"].get<double>();
    return share ? Json(0) : *found;
  }

  void require_version(const Json& own) const {
    const auto version = own.find("version");
    if (version != own.end() && *version == Json(kVersion)) return;
    throw UserError(fmt::format("{}: {} is of version {}, and this Fathom reads version {}.", path_, kOurs,
                                version == own.end() ? "none" : version->dump(), kVersion),
                    "Export the model again with the Fathom that reads it.");
  }

  void read_meta(const Json& own, CheckpointMeta& meta) const {
    const auto string_of = [&](const char* key) {
      const auto found = own.find(key);
      return found != own.end() && found->is_string() ? found->get<std::string>() : std::string();
    };
    meta.tokenizer_kind = string_of("tokenizer_kind");
    meta.tokenizer_hash = string_of("tokenizer_hash");
    meta.store_hash = string_of("store_hash");
    meta.git_sha = string_of("git_sha");
    const auto step = own.find("step");
    if (step != own.end() && step->is_number_integer()) meta.state.step = step->get<std::int64_t>();
  }

  const Json& json_;
  const std::string& path_;
};

}  // namespace

std::string exchange_type(const Config& config) {
  if (config.routing.kind != RoutingKind::None) return kOurs;
  return config.model.qk_norm ? "qwen3" : "llama";
}

std::string exchange_config(const Config& config, const CheckpointMeta& meta, DType dtype,
                            const TextEnds& ends, const Quantization* quantization) {
  const ModelConfig& m = config.model;
  const std::string type = exchange_type(config);
  const char* architecture = type == "llama"   ? "LlamaForCausalLM"
                             : type == "qwen3" ? "Qwen3ForCausalLM"
                                               : "FathomForCausalLM";
  Json json = {
      {"architectures", {architecture}},   {"model_type", type},
      {"vocab_size", m.vocab_size},        {"hidden_size", m.width},
      {"intermediate_size", m.ffn_hidden}, {"num_hidden_layers", m.depth},
      {"num_attention_heads", m.heads},    {"num_key_value_heads", m.kv_heads},
      {"head_dim", m.head_dim()},          {"max_position_embeddings", m.max_seq_len},
      {"rope_theta", m.rope_theta},        {"rope_scaling", scaling_of(m.rope_scaling)},
      {"rms_norm_eps", m.norm_eps},        {"hidden_act", "silu"},
      {"attention_bias", false},           {"mlp_bias", false},
      {"attention_dropout", 0.0},          {"tie_word_embeddings", m.tie_embeddings},
      {"bos_token_id", bos_of(ends)},      {"eos_token_id", stops_of(ends)},
      {"pad_token_id", nullptr},           {"torch_dtype", dtype == DType::BF16 ? "bfloat16" : "float32"}};
  Json own = {{"version", kVersion},
              {"step", meta.state.step},
              {"git_sha", meta.git_sha},
              {"store_hash", meta.store_hash},
              {"tokenizer_kind", meta.tokenizer_kind},
              {"tokenizer_hash", meta.tokenizer_hash}};
  if (type == kOurs) {
    own["qk_norm"] = m.qk_norm;
    Json routing = section_of(config, "routing");
    routing["experts"] = section_of(config, "experts");
    json[kRouting] = std::move(routing);
  }
  if (quantization != nullptr) json[kQuantization] = Json::parse(print_quantization(*quantization));
  json[kOurs] = std::move(own);
  return json.dump(2) + "\n";
}

std::string exchange_generation_config(const TextEnds& ends) {
  return Json{{"bos_token_id", bos_of(ends)}, {"eos_token_id", stops_of(ends)}}.dump(2) + "\n";
}

TextEnds parse_text_ends(const std::string& text, const std::string& path, std::int64_t vocab_size) {
  const Json json = Json::parse(text, nullptr, false);
  if (!json.is_object()) throw UserError(fmt::format("{} is no JSON object.", path));
  // An id that no text has is of no consequence.
  const auto read = [&](const char* key, const Json& id) -> std::int32_t {
    if (!id.is_number_integer()) {
      throw UserError(fmt::format("{}: {} is {}, not a token's id or a list of them.", path, key, id.dump()));
    }
    return id >= 0 && id < vocab_size ? id.get<std::int32_t>() : -1;
  };
  const auto found = [&](const char* key) {
    const auto at = json.find(key);
    if (at == json.end() || at->is_null()) return std::vector<Json>();
    return at->is_array() ? at->get<std::vector<Json>>() : std::vector<Json>{*at};
  };
  TextEnds ends;
  for (const Json& id : found("eos_token_id")) {
    const std::int32_t stop = read("eos_token_id", id);
    if (stop >= 0) ends.stops.push_back(stop);
  }
  const std::vector<Json> begins = found("bos_token_id");
  if (begins.size() == 1) ends.bos = read("bos_token_id", begins[0]);
  return ends;
}

ExchangeConfig parse_exchange_config(const std::string& text, const std::string& path) {
  const Json json = Json::parse(text, nullptr, false);
  if (json.is_discarded()) throw UserError(fmt::format("{} is no JSON.", path));
  try {
    return Reader(json, path).read();
  } catch (const Json::exception& e) {
    throw UserError(fmt::format("{} has a value of another type than is written there: {}", path, e.what()));
  }
}

}  // namespace fathom
