#include "train/resume.h"

#include <filesystem>
#include <optional>
#include <utility>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/parse.h"
#include "src/config/print.h"
#include "src/flops/flops.h"
#include "src/io/damaged_file.h"
#include "train/metrics/metrics_log.h"

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
  return config;
}

void require_same_config(const RunFolder& folder, const Config& config) {
  if (!std::filesystem::exists(folder.config_path())) return;
  const Config saved = load_config(folder.config_path());
  std::string differs = difference(with_free_keys_of(config, saved), saved);
  if (differs.empty()) return;
  differs.pop_back();  // the last line's end
  for (std::size_t end = 0; (end = differs.find('\n', end)) != std::string::npos;)
    differs.replace(end, 1, "; ");
  throw UserError(fmt::format("{} holds a run of another config ({}).", folder.path().string(), differs),
                  "Choose another --run-dir, or give the config that the run was started with.");
}

struct Loaded {
  std::filesystem::path checkpoint;
  CheckpointMeta meta;
};

Loaded load(const std::filesystem::path& path, const Trainee& t) {
  return {path, load_checkpoint(path, t.context, t.model.parameters(), &t.optimizer)};
}

// From the newest good checkpoint of the folder; empty when it has none.
std::optional<Loaded> load_newest(const RunFolder& folder, const Trainee& trainee,
                                  std::vector<std::string>& damaged) {
  std::vector<std::filesystem::path> unusable;
  for (const CheckpointFile& file : folder.resume_candidates()) {
    try {
      Loaded loaded = load(file.path, trainee);
      for (const std::filesystem::path& path : unusable) folder.set_aside(path);
      return loaded;
    } catch (const DamagedFile& e) {
      damaged.emplace_back(e.what());
      unusable.push_back(file.path);
    }
  }
  if (damaged.empty()) return std::nullopt;
  throw UserError(fmt::format("No checkpoint of {} can be used. {}", folder.path().string(), damaged.front()),
                  "Start again in another --run-dir, or put a good copy in its place.");
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

Loaded load_borrowed(const std::filesystem::path& path, const TrainingInputs& inputs,
                     const Trainee& trainee) {
  Loaded loaded = load(find_checkpoint(path), trainee);
  require_same_store(loaded.meta, inputs);
  const std::int64_t steps = plan_horizon(inputs.config).steps;
  if (loaded.meta.state.step < steps) return loaded;
  throw UserError(fmt::format("{} is at step {}, and this config ends at step {}: there is nothing to train.",
                              loaded.checkpoint.string(), loaded.meta.state.step, steps),
                  "Give a longer horizon.");
}

}  // namespace

void require_resumable(const RunFolder& folder, ResumeMode mode, const Config& config) {
  if (mode == ResumeMode::Never && folder.has_history()) {
    throw UserError(
        fmt::format("{} already holds a run, and --resume never was given.", folder.path().string()),
        "Choose another --run-dir, or --resume auto to go on with it.");
  }
  require_same_config(folder, config);
}

Beginning begin_run(const RunFolder& folder, const ResumeRequest& request, const TrainingInputs& inputs,
                    const Trainee& trainee) {
  Beginning beginning;
  std::optional<Loaded> loaded;
  if (request.mode == ResumeMode::From && folder.checkpoints().empty()) {
    loaded = load_borrowed(request.from, inputs, trainee);
    beginning.borrowed = true;
  } else {
    loaded = load_newest(folder, trainee, beginning.damaged);
    if (loaded) require_same_store(loaded->meta, inputs);
  }
  if (!loaded) {
    trainee.model.initialise(trainee.context, inputs.config.seed);
    return beginning;
  }
  beginning.state = loaded->meta.state;
  beginning.checkpoint = std::move(loaded->checkpoint);
  return beginning;
}

bool is_done(const RunFolder& folder) {
  if (!std::filesystem::exists(folder.metrics_path())) return false;
  const Metrics metrics = read_metrics(folder.metrics_path());
  return !metrics.events.empty() && metrics.events.back().status == RunStatus::Done;
}

}  // namespace fathom
