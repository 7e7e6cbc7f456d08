// A run's beginning and its checkpoints, of one rank or of several. A checkpoint does not know how many ranks
// wrote it: it holds whole arenas, which rank 0 reads and writes.
#pragma once

#include <filesystem>

#include "train/optimizer.h"
#include "train/ranks.h"
#include "train/resume.h"

namespace fathom {

/// What a rank trains.
struct RankTrainee {
  Ranks& ranks;
  Context& context;
  Transformer& model;
  AdamW& optimizer;
};

/// begin_run by rank 0, whose folder it is (null on the others); all ranks have what it found. Names of files
/// are known to rank 0 alone.
Beginning begin_together(const RunFolder* folder, const ResumeRequest& request, const TrainingInputs& inputs,
                         const RankTrainee& trainee);

/// save_checkpoint by rank 0, with the parts of all. Leaves the gradients unusable where there are several
/// ranks.
void save_together(const std::filesystem::path& path, const RankTrainee& trainee, const CheckpointMeta& meta);

}  // namespace fathom
