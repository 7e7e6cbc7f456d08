#include "train/resume.h"

#include <filesystem>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/parse.h"
#include "src/config/print.h"
#include "src/io/damaged_file.h"

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

}  // namespace

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

std::optional<Resumed> resume_from_folder(const RunFolder& folder, Context& c, ParameterSet& parameters,
                                          OptimizerState& optimizer) {
  Resumed resumed;
  std::vector<std::filesystem::path> unusable;
  for (const CheckpointFile& file : folder.resume_candidates()) {
    try {
      resumed.meta = load_checkpoint(file.path, c, parameters, &optimizer);
      resumed.checkpoint = file.path;
      for (const std::filesystem::path& path : unusable) folder.set_aside(path);
      return resumed;
    } catch (const DamagedFile& e) {
      resumed.damaged.emplace_back(e.what());
      unusable.push_back(file.path);
    }
  }
  if (resumed.damaged.empty()) return std::nullopt;
  throw UserError(
      fmt::format("No checkpoint of {} can be used. {}", folder.path().string(), resumed.damaged.front()),
      "Start again in another --run-dir, or put a good copy in its place.");
}

void require_same_store(const CheckpointMeta& meta, const TokenStoreInfo& info,
                        const std::string& content_hash, const std::string& store_path) {
  if (meta.tokenizer_hash != info.tokenizer_hash) {
    throw UserError(
        fmt::format("{} was made with the tokenizer {} ({}), but the checkpoint was trained with {} ({}).",
                    store_path, info.tokenizer_hash, info.tokenizer_kind, meta.tokenizer_hash,
                    meta.tokenizer_kind),
        "Use the store that the run was started with.");
  }
  if (meta.store_hash != content_hash) {
    throw UserError(
        fmt::format("{} holds other text (content {}) than the checkpoint was trained on (content {}).",
                    store_path, content_hash, meta.store_hash),
        "Use the store that the run was started with: its order of data is part of the run.");
  }
}

}  // namespace fathom
