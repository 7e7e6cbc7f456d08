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
/// the one before it, and set aside. UserError, with the folder as it was: it holds what the request or the
/// config does not allow to go on with: any run for ResumeMode::Never, or one of another config that has a
/// checkpoint or is finished; all its checkpoints are damaged; the newest good one cannot be used for another
/// reason (no permission, a newer Fathom's, another model's), which going back would hide; what it was
/// trained with is not what is given (train/same_run.h); or another run's checkpoint is past this config's
/// horizon.
Beginning begin_run(const RunFolder& folder, const ResumeRequest& request, const TrainingInputs& inputs,
                    const Trainee& trainee);

/// Throws what begin_run would for the folder `run`, which may be absent, and writes nothing.
void check_beginning(const std::filesystem::path& run, const ResumeRequest& request,
                     const TrainingInputs& inputs);

/// Whether the run came to its end by itself.
bool is_done(const std::filesystem::path& run);

}  // namespace fathom
