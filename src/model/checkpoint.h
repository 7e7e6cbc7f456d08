// Checkpoints: everything a training needs to go on as if it had never stopped, in one file of Fathom's HDF5
// kind "checkpoint" (docs/formats.md). The file is complete or absent, and verified before it is read
// (io/hdf5_file.h).
//
// Parameters and moments are stored by parameter name, so that the arenas' layout may change.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "src/config/config.h"
#include "src/model/transformer.h"

namespace fathom {

/// Where a run stands. Data order, stochastic routing and initialisation are pure functions of (seed, step),
/// so the step is the cursor and the random state.
struct TrainingState {
  std::int64_t step = 0;       // optimizer steps done
  std::int64_t tokens = 0;     // trained on
  std::int64_t sequences = 0;  // read from the store: the data cursor
  double flops = 0;
  double seconds = 0;
  double loss_average = 0;  // what spikes are measured against
  std::int64_t steps_averaged = 0;
  std::int64_t skipped_in_a_row = 0;
  double best_val_loss = 0;  // valid when best_step > 0
  std::int64_t best_step = 0;
};

struct CheckpointMeta {
  TrainingState state;
  std::string config_yaml;     // resolved
  std::string tokenizer_kind;  // of the store trained on
  std::string tokenizer_hash;
  std::string store_hash;  // content of the training store
  std::string git_sha;
};

/// Adam's moments, flat arenas laid out as the parameters'.
struct OptimizerState {
  Tensor m;
  Tensor v;
};

enum class Moment { First, Second };
/// A moment's arena, laid out as the parameters'. Asked once for each, the first one first; the second answer
/// may overwrite what the first one gave.
using Moments = std::function<Tensor(Moment)>;

/// Writes `path` whole or not at all. UserError: the disk refuses; what was at `path` stays.
void save_checkpoint(const std::filesystem::path& path, Context& c, const ParameterSet& parameters,
                     const Moments& moments, const CheckpointMeta& meta);
void save_checkpoint(const std::filesystem::path& path, Context& c, const ParameterSet& parameters,
                     const OptimizerState& optimizer, const CheckpointMeta& meta);

/// Reads the description only (after verifying the whole file).
CheckpointMeta read_checkpoint_meta(const std::filesystem::path& path);

/// Loads parameters and, when `optimizer` is not null, its moments. UserError: damaged, or of a model of
/// another shape (the message names the first parameter that differs). Nothing is changed in that case.
CheckpointMeta load_checkpoint(const std::filesystem::path& path, Context& c, ParameterSet& parameters,
                               OptimizerState* optimizer);

/// The file that PATH means: itself if it is a file, the config.json of an exported model (exchange.h), or
/// the newest checkpoint of a run folder (what `latest` names, or else the highest step). UserError when
/// there is none.
std::filesystem::path find_checkpoint(const std::filesystem::path& path);

/// A model that was trained, for evaluation and inference.
/// Tokens around a text, as the files of a model in exchange say. A tokenizer knows some of them, not those
/// of a model that was trained to answer.
struct TextEnds {
  std::vector<std::int32_t> stops;  // each of them ends a text
  std::int32_t bos = -1;            // -1: none
};

struct LoadedModel {
  Config config;
  CheckpointMeta meta;
  TextEnds ends;  // of a model in exchange
  std::filesystem::path checkpoint;
  std::unique_ptr<Transformer> model;
};

/// Loads the model of a run folder, a checkpoint file or an exported model.
LoadedModel load_model(const std::filesystem::path& path, Context& c);
/// The same, in the context that `context_for` gives for the model's config.
LoadedModel load_model(const std::filesystem::path& path,
                       const std::function<Context&(const Config&)>& context_for);

}  // namespace fathom
