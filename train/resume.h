// Where a run begins: anew, where its folder's newest checkpoint stands, or at another run's checkpoint.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "src/model/checkpoint.h"
#include "train/inputs.h"
#include "train/run_folder.h"

namespace fathom {

enum class ResumeMode {
  Auto,   // go on from the folder's newest checkpoint, if it has one
  Never,  // refuse a folder that holds a run
  From    // a new run begins at another run's checkpoint; one that has its own goes on from those
};

struct ResumeRequest {
  ResumeMode mode = ResumeMode::Auto;
  std::filesystem::path from;  // with ResumeMode::From: a checkpoint or a run folder
};

/// Throws UserError when `folder` holds what the request or the config does not allow to go on with: any run
/// for ResumeMode::Never, or a run of another config (the message says what differs). Keys that do not change
/// what is computed (logging, evaluation, checkpointing, paths of the stores) may differ.
void require_resumable(const RunFolder& folder, ResumeMode mode, const Config& config);

/// What a training changes.
struct Trainee {
  Context& context;
  Transformer& model;
  OptimizerState& optimizer;
};

struct Beginning {
  TrainingState state;
  std::filesystem::path checkpoint;  // empty: a new run
  bool borrowed = false;             // the checkpoint is another run's
  std::vector<std::string> damaged;  // newer checkpoints that were passed over, each with its reason
};

/// Initialises the model, or loads what it begins from. A damaged checkpoint of the folder is passed over for
/// the one before it, and set aside. UserError: all of them are damaged; the newest good one cannot be used
/// for another reason (no permission, a newer Fathom's, another model's), which going back would hide; it was
/// trained on other data or with another tokenizer; or another run's checkpoint is past this config's
/// horizon.
Beginning begin_run(const RunFolder& folder, const ResumeRequest& request, const TrainingInputs& inputs,
                    const Trainee& trainee);

/// Whether the folder's run came to its end by itself.
bool is_done(const RunFolder& folder);

}  // namespace fathom
