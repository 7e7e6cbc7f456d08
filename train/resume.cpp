#include "train/resume.h"

#include <filesystem>
#include <optional>
#include <utility>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/parse.h"
#include "src/flops/flops.h"
#include "src/io/damaged_file.h"
#include "train/metrics/metrics_log.h"
#include "train/same_run.h"

namespace fathom {

namespace {

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

Loaded load_borrowed(const std::filesystem::path& path, const TrainingInputs& inputs,
                     const Trainee& trainee) {
  Loaded loaded = load(find_checkpoint(path), trainee);
  require_same_model(loaded.checkpoint, loaded.meta, inputs);
  const std::int64_t steps = plan_horizon(inputs.config).steps;
  loaded.meta.state.best_val_loss = 0;  // of the other run's text, maybe, and not of this run's evaluations
  loaded.meta.state.best_step = 0;
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
  // Without a checkpoint there is nothing to go on with: what failed before the first one begins anew, with
  // the smaller micro-batch that its error asked for, say. A finished run is kept all the same.
  if (!std::filesystem::exists(folder.config_path()) || (folder.checkpoints().empty() && !is_done(folder)))
    return;
  require_same_config(folder.path().string(), config, load_config(folder.config_path()));
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
    if (loaded) {
      require_same_run(loaded->checkpoint, loaded->meta, inputs);
      require_same_validation(folder.metrics_path(), inputs);
    }
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
