// What must be equal for a training to go on from a checkpoint: the config, the model, the text.
#pragma once

#include <filesystem>
#include <string>

#include "src/model/checkpoint.h"
#include "train/inputs.h"

namespace fathom {

/// The config file at `path`, resolved as the training on `inputs` resolves its own. UserError when it is
/// none.
Config config_at(const std::filesystem::path& path, const TrainingInputs& inputs);

/// UserError when `config` differs from `saved`, the config of what `where` names, in more than what changes
/// nothing that is computed (logging, evaluation, checkpointing, paths of the stores). The message says in
/// what.
void require_same_config(const std::string& where, const Config& config, const Config& saved);

/// The same of a run's own checkpoint, with the config inside it, and with the training store that it read.
void require_same_run(const std::filesystem::path& checkpoint, const CheckpointMeta& meta,
                      const TrainingInputs& inputs);

/// UserError when the validation store holds other text than the run in `metrics` was evaluated on: its
/// losses would not compare. A run without one may get one, and lose it.
void require_same_validation(const std::filesystem::path& metrics, const TrainingInputs& inputs);

/// UserError when another run's checkpoint is of another model function, though maybe of the same shapes, or
/// was trained on another store. Thresholds and weights of losses may differ, and how it was trained.
void require_same_model(const std::filesystem::path& checkpoint, const CheckpointMeta& meta,
                        const TrainingInputs& inputs);

/// Whether the config file at `path` says what the resolved config of `inputs` says. Then it stays as it is,
/// comments and all.
bool says_the_same(const std::filesystem::path& path, const TrainingInputs& inputs);

/// UserError when writing the config of `inputs` to `run`/config.yaml would lose what somebody wrote there:
/// it says something else, and is not what an earlier start of this run left.
void require_no_lost_config(const std::filesystem::path& run, const TrainingInputs& inputs);

}  // namespace fathom
