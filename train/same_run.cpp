#include "train/same_run.h"

#include <optional>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/parse.h"
#include "src/config/print.h"
#include "src/config/resolve.h"
#include "src/io/atomic_file.h"
#include "train/metrics/metrics_log.h"
#include "train/run_folder.h"

namespace fathom {

namespace {

// `config` with everything that may differ between two parts of one run taken from `other`.
Config with_free_keys_of(Config config, const Config& other) {
  config.device = other.device;
  config.data.train = other.data.train;  // the content is compared, not the path
  config.data.valid = other.data.valid;
  config.data.tokenizer = other.data.tokenizer;
  config.train.recompute = other.train.recompute;  // bit-equal either way
  config.train.log_every = other.train.log_every;
  config.train.eval_every = other.train.eval_every;
  config.train.eval_tokens = other.train.eval_tokens;
  config.train.checkpoint_every = other.train.checkpoint_every;
  config.train.keep_checkpoints = other.train.keep_checkpoints;
  config.train.on_spike = other.train.on_spike;
  config.train.spike_factor = other.train.spike_factor;
  config.train.rank_timeout = other.train.rank_timeout;
  return config;
}

// The model that `config` describes, with everything from `other` that leaves its function as it is.
Config model_of(const Config& config, const Config& other) {
  Config model = other;
  model.model = config.model;
  model.model.max_seq_len = other.model.max_seq_len;  // a limit; positions are relative (RoPE)
  if (config.routing.kind == RoutingKind::None && other.routing.kind == RoutingKind::None) return model;
  model.routing = config.routing;
  CausalConfig& causal = model.routing.causal;
  causal.aux_weight = other.routing.causal.aux_weight;
  causal.threshold = other.routing.causal.threshold;
  // With or without the auxiliary loss, the causal rule asks the predictor where there is one.
  if (config.routing.has_predictor() == other.routing.has_predictor()) {
    causal.method = other.routing.causal.method;
    if (!config.routing.has_predictor()) causal.predictor_hidden = other.routing.causal.predictor_hidden;
  }
  return model;
}

// "model.depth: 4 here, 6 there; train.lr: ..."; empty when equal.
std::string differences(const Config& here, const Config& there) {
  std::string lines = difference(here, there);
  if (lines.empty()) return lines;
  lines.pop_back();  // the last line's end
  for (std::size_t end = 0; (end = lines.find('\n', end)) != std::string::npos;) lines.replace(end, 1, "; ");
  return lines;
}

Config config_in(const std::filesystem::path& checkpoint, const CheckpointMeta& meta) {
  return parse_config(meta.config_yaml, checkpoint.string() + ":config.yaml");
}

void require_same_store(const CheckpointMeta& meta, const TrainingInputs& inputs) {
  const TokenStoreInfo& info = inputs.train->info();
  const std::string& path = inputs.config.data.train;
  if (meta.tokenizer_hash != info.tokenizer_hash) {
    throw UserError(
        fmt::format("{} was made with the tokenizer {} ({}), but the checkpoint was trained with {} ({}).",
                    path, info.tokenizer_hash, info.tokenizer_kind, meta.tokenizer_hash, meta.tokenizer_kind),
        "Use the store that the run was started with.");
  }
  const std::string content_hash = inputs.train->content_hash();
  if (meta.store_hash != content_hash) {
    throw UserError(
        fmt::format("{} holds other text (content {}) than the checkpoint was trained on (content {}).", path,
                    content_hash, meta.store_hash),
        "Use the store that the run was started with: its order of data is part of the run.");
  }
}

// What stands at a run's config.yaml.
struct ConfigFile {
  Config resolved;
  bool printed = false;  // it has every key and nothing else, as what a start writes
};

// None when it is no config.
std::optional<ConfigFile> config_file(const std::filesystem::path& path, const TrainingInputs& inputs) {
  try {
    const bool printed = read_file(path.string(), "config") == to_yaml(load_config(path));
    return ConfigFile{config_at(path, inputs), printed};
  } catch (const UserError&) {
    return std::nullopt;
  }
}

}  // namespace

Config config_at(const std::filesystem::path& path, const TrainingInputs& inputs) {
  const Config config = load_config(path);
  if (config.model.vocab_size > 0) return resolve(config);
  return resolve(config, inputs.train->vocab_size());
}

void require_same_config(const std::string& where, const Config& config, const Config& saved) {
  const std::string differs = differences(with_free_keys_of(config, saved), saved);
  if (differs.empty()) return;
  throw UserError(fmt::format("{} holds a run of another config ({}).", where, differs),
                  "Choose another --run-dir, or give the config that the run was started with.");
}

void require_same_run(const std::filesystem::path& checkpoint, const CheckpointMeta& meta,
                      const TrainingInputs& inputs) {
  require_same_store(meta, inputs);
  require_same_config(checkpoint.string(), inputs.config, config_in(checkpoint, meta));
}

void require_same_validation(const std::filesystem::path& metrics, const TrainingInputs& inputs) {
  if (!inputs.valid || !std::filesystem::exists(metrics)) return;
  std::string evaluated_on;
  for (const EventRecord& event : read_metrics(metrics).events) {
    if (event.kind == EventKind::Start) evaluated_on.clear();  // the run began anew
    if (event.facts && !event.facts->valid_source_hash.empty()) evaluated_on = event.facts->valid_source_hash;
  }
  const std::string hash = inputs.valid->source_hash();
  if (evaluated_on.empty() || evaluated_on == hash) return;
  throw UserError(fmt::format("data.valid ({}) holds other text (source {}) than this run's evaluations were "
                              "made on (source {}): their losses would not compare.",
                              inputs.config.data.valid, hash, evaluated_on),
                  "Use the store that the run was started with, or evaluate on this one with fathom eval "
                  "--data.");
}

void require_same_model(const std::filesystem::path& checkpoint, const CheckpointMeta& meta,
                        const TrainingInputs& inputs) {
  require_same_store(meta, inputs);
  const Config saved = config_in(checkpoint, meta);
  const std::string differs = differences(model_of(inputs.config, saved), saved);
  if (differs.empty()) return;
  throw UserError(
      fmt::format("{} is a checkpoint of another model than this config's ({}).", checkpoint.string(),
                  differs),
      "Give the model and routing that it was trained with, or train a new model without --resume.");
}

bool says_the_same(const std::filesystem::path& path, const TrainingInputs& inputs) {
  const std::optional<ConfigFile> there = config_file(path, inputs);
  return there && difference(inputs.config, there->resolved).empty();
}

void require_no_lost_config(const std::filesystem::path& run, const TrainingInputs& inputs) {
  const std::filesystem::path path = run / "config.yaml";
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error) || std::filesystem::is_empty(path, error)) return;
  const std::optional<ConfigFile> there = config_file(path, inputs);
  const std::string differs = there ? differences(inputs.config, there->resolved) : "it is not a config";
  if (differs.empty() || (there && there->printed && has_history(run))) return;
  throw UserError(
      fmt::format("cannot write {}: what stands there is not this run's config ({}) and would be lost.",
                  path.string(), differs),
      "Make the change in that file, move it, or choose another --run-dir.");
}

}  // namespace fathom
