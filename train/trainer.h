// One training run, from a config to a checkpoint: `fathom train` without the command line.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <ostream>
#include <string>

#include "src/config/config.h"
#include "src/model/checkpoint.h"
#include "train/comm/communicator.h"
#include "train/metrics/record.h"
#include "train/resume.h"

namespace fathom {

struct TrainOptions {
  std::filesystem::path run_dir;
  ResumeRequest resume;
  /// FLOP/s of the machine for a config, for MFU; asked once the run is under way. Empty: MFU is not
  /// reported.
  std::function<double(const Config&)> peak_flops_per_s;
  std::string git_sha;  // of the build
  bool console_is_terminal = false;
  std::function<int()> console_width = {};  // columns of that terminal; empty: 100
  std::function<std::string(const Config&)> plan =
      {};                         // of the resolved config, as JSON, for plan.json; empty: none
  std::int64_t total_memory = 0;  // bytes of the machine, for the start-up table; 0: unknown
  /// Null: this process trains alone. Else all ranks call train() with the same arguments; rank 0's run
  /// folder, console and peak are the ones that count.
  std::shared_ptr<Communicator> ranks = {};
  std::string build = {};  // of several ranks: which program this is, the same on all of them
};

struct TrainResult {
  RunStatus status = RunStatus::Done;
  TrainingState state;
  double final_loss = 0;  // running mean of the training loss, nats a token
  std::int64_t resumed_at = 0;
  std::filesystem::path checkpoint;  // the newest one
  std::string message;               // why it stopped, and how to go on
  bool already_done = false;         // the run folder held a finished run: nothing was done
};

/// Opens and checks everything that a training of `config` reads (the stores against each other, the
/// tokenizer, the sequence length, and what it would begin from; an empty `run_dir` is not looked at) and
/// returns the resolved config: a training without the training. Writes nothing. UserError: as train().
Config check_training(const Config& config, const std::filesystem::path& run_dir,
                      const ResumeRequest& resume);

/// Trains until the horizon, a signal or a spike with on_spike: stop. `config` is as read from its file; the
/// token store gives it its vocabulary. UserError: anything wrong with the config, the stores, the run folder
/// or the disk; the newest complete checkpoint stays valid then. RankError: another rank is lost, or failed.
TrainResult train(const Config& config, const TrainOptions& options, std::shared_ptr<Backend> backend,
                  std::ostream& console);

}  // namespace fathom
