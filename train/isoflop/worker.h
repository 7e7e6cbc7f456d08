// One worker of a sweep: takes cells from the sweep's folder and trains them, until nothing is left for it.
//
// Any number of workers run on one folder, on one machine or on several that share it. A cell belongs to one
// worker at a time (claim.h); a killed worker's cell is resumed from its newest checkpoint by whoever takes
// it next. So kill -9 at any moment loses the steps since that checkpoint and nothing else.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "train/isoflop/plan.h"
#include "train/trainer.h"

namespace fathom::isoflop {

/// Trains one cell in its run folder, resuming what it holds: train() of trainer.h on the caller's backend.
using TrainCell = std::function<TrainResult(const Config&, const std::filesystem::path& run_dir)>;

struct WorkOptions {
  std::vector<std::string> only;  // shell patterns of cells' ids; empty: all
  std::int64_t max_cells = 0;     // that this worker trains; 0: no limit
  bool retry_failed = false;      // failed cells get one more try
  bool wait = true;               // for other workers' results, where further cells depend on them
  double poll_seconds = 2;
  ClaimTimes claims;
  std::function<void(const std::string&)> log = {};  // a line a cell that begins or ends
};

struct WorkResult {
  std::int64_t done = 0, failed = 0;  // by this worker, now
  std::int64_t elsewhere = 0;         // cells that other workers were running at the end
  std::int64_t left = 0;              // cells that have not ended, those included
  bool stopped = false;               // by a signal: the cell under way was saved
};

/// A cell that fails is recorded with its reason and the sweep goes on; three in a row that end with an error
/// rather than with a loss (a broken device, a full disk) end the worker with a UserError, and so does the
/// first DeviceError. UserError as well: the folder cannot be used, or a finished cell was trained with
/// another config than the sweep says now.
WorkResult work(const Sweep& sweep, const SweepFolder& folder, const DataSize& data,
                const TrainCell& train_cell, const WorkOptions& options);

}  // namespace fathom::isoflop
