#include "train/resume.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/flops/flops.h"
#include "src/io/damaged_file.h"
#include "src/model/exchange.h"
#include "train/metrics/metrics_log.h"
#include "train/same_run.h"

namespace fathom {

namespace {

// How a checkpoint is read: into the model, or its description alone.
using Reader = std::function<CheckpointMeta(const std::filesystem::path&)>;

struct Found {
  std::filesystem::path checkpoint;
  CheckpointMeta meta;
  bool borrowed = false;
  std::vector<std::string> damaged;                // newer ones that were passed over, each with its reason
  std::vector<std::filesystem::path> passed_over;  // the same
};

// The newest good checkpoint of the run; none when it has none at all.
std::optional<Found> newest_of(const std::filesystem::path& run, const Reader& read) {
  std::vector<CheckpointFile> files = list_checkpoints(run);
  if (files.empty()) return std::nullopt;
  Found found;
  std::reverse(files.begin(), files.end());
  for (const CheckpointFile& file : files) {
    try {
      found.meta = read(file.path);
      found.checkpoint = file.path;
      return found;
    } catch (const DamagedFile& e) {
      found.damaged.emplace_back(e.what());
      found.passed_over.push_back(file.path);
    }
  }
  throw UserError(fmt::format("No checkpoint of {} can be used. {}", run.string(), found.damaged.front()),
                  "Start again in another --run-dir, or put a good copy in its place.");
}

Found borrowed_from(const std::filesystem::path& path, const TrainingInputs& inputs, const Reader& read) {
  Found found;
  found.borrowed = true;
  if (is_exported_model(path)) {
    throw UserError(
        fmt::format("{} is an exported model, which has no optimizer's state to go on from.", path.string()),
        "Name the run folder, or a checkpoint of it.");
  }
  found.checkpoint = find_checkpoint(path);
  found.meta = read(found.checkpoint);
  require_same_model(found.checkpoint, found.meta, inputs);
  TrainingState& state = found.meta.state;
  state.best_val_loss = 0;  // of the other run's text, maybe, and not of this run's evaluations
  state.best_step = 0;
  const std::int64_t steps = plan_horizon(inputs.config).steps;
  if (state.step < steps) return found;
  throw UserError(fmt::format("{} is at step {}, and this config ends at step {}: there is nothing to train.",
                              found.checkpoint.string(), state.step, steps),
                  "Give a longer horizon.");
}

// What a training in the folder `run` begins from; none when it begins anew. Writes nothing.
std::optional<Found> find_beginning(const std::filesystem::path& run, const ResumeRequest& request,
                                    const TrainingInputs& inputs, const Reader& read) {
  if (request.mode == ResumeMode::Never && has_history(run)) {
    throw UserError(fmt::format("{} already holds a run, and --resume never was given.", run.string()),
                    "Choose another --run-dir, or --resume auto to go on with it.");
  }
  const bool has_checkpoint = !list_checkpoints(run).empty();
  // Without a checkpoint there is nothing to go on with: what failed before the first one begins anew, with
  // the smaller micro-batch that its error asked for, say. A finished run is kept all the same.
  const std::filesystem::path config = run / "config.yaml";
  if (std::filesystem::exists(config) && (has_checkpoint || is_done(run)))
    require_same_config(run.string(), inputs.config, config_at(config, inputs));
  require_no_lost_config(run, inputs);
  if (request.mode == ResumeMode::From && !has_checkpoint) return borrowed_from(request.from, inputs, read);
  std::optional<Found> found = newest_of(run, read);
  if (found) {
    require_same_run(found->checkpoint, found->meta, inputs);
    require_same_validation(run / "metrics.jsonl", inputs);
  }
  return found;
}

}  // namespace

void check_beginning(const std::filesystem::path& run, const ResumeRequest& request,
                     const TrainingInputs& inputs) {
  require_no_file(run);
  find_beginning(run, request, inputs, read_checkpoint_meta);
}

Beginning begin_run(const RunFolder& folder, const ResumeRequest& request, const TrainingInputs& inputs,
                    const Trainee& trainee) {
  const Reader load = [&](const std::filesystem::path& path) {
    return load_checkpoint(path, trainee.context, trainee.model.parameters(), &trainee.optimizer);
  };
  std::optional<Found> found = find_beginning(folder.path(), request, inputs, load);
  Beginning beginning;
  if (!found) {
    trainee.model.initialise(trainee.context, inputs.config.seed);
    return beginning;
  }
  for (const std::filesystem::path& path : found->passed_over) folder.set_aside(path);
  beginning.state = found->meta.state;
  beginning.checkpoint = std::move(found->checkpoint);
  beginning.borrowed = found->borrowed;
  beginning.damaged = std::move(found->damaged);
  return beginning;
}

bool is_done(const std::filesystem::path& run) {
  const std::filesystem::path path = run / "metrics.jsonl";
  if (!std::filesystem::exists(path)) return false;
  const Metrics metrics = read_metrics(path);
  return !metrics.events.empty() && metrics.events.back().status == RunStatus::Done;
}

}  // namespace fathom
