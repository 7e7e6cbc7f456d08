// Finding out what a run folder holds: nothing, a run to go on with, or one that is done.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "src/io/token_store.h"
#include "src/model/checkpoint.h"
#include "train/run_folder.h"

namespace fathom {

/// Throws UserError when `folder` holds a run of another config: the message says what differs. Keys that do
/// not change what is computed (logging, evaluation, checkpointing, paths of the stores) may differ.
void require_same_config(const RunFolder& folder, const Config& config);

/// What was resumed from.
struct Resumed {
  std::filesystem::path checkpoint;
  CheckpointMeta meta;
  std::vector<std::string> damaged;  // newer checkpoints that were passed over, each with its reason
};

/// Loads the newest good checkpoint of the folder; empty when it has none. A damaged one is passed over for
/// the one before it, and set aside. UserError: all of them are damaged, or the newest good one cannot be
/// used for another reason (no permission, a newer Fathom's, another model's), which going back would hide.
std::optional<Resumed> resume_from_folder(const RunFolder& folder, Context& c, ParameterSet& parameters,
                                          OptimizerState& optimizer);

/// Throws UserError when the checkpoint was trained on other data or with another tokenizer than `store`.
void require_same_store(const CheckpointMeta& meta, const TokenStoreInfo& info,
                        const std::string& content_hash, const std::string& store_path);

}  // namespace fathom
