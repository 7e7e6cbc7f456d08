// One call from the trainer for each thing that happens: metrics.jsonl, TensorBoard, the console and
// train.log get it.
#pragma once

#include <fstream>
#include <string>

#include "train/metrics/console.h"
#include "train/metrics/metrics_log.h"
#include "train/metrics/tensorboard.h"
#include "train/run_folder.h"

namespace fathom {

class Recorder {
 public:
  /// `step`: steps done before this part of the run; see MetricsLog and TensorBoardWriter. `total_steps`: the
  /// horizon. `console` outlives this. UserError: the folder cannot be written to.
  Recorder(const RunFolder& folder, std::int64_t step, std::int64_t total_steps, Console& console);

  void record(const StepRecord& record);
  void record(const EvalRecord& record);
  void record(const EventRecord& record);
  /// For people only: console and train.log.
  void message(const std::string& text);
  /// train.log only, for what the console hears otherwise.
  void log_message(const std::string& text) { log_console_.message(text); }
  void sync() { log_.sync(); }

 private:
  MetricsLog log_;
  TensorBoardWriter tensorboard_;
  Console& console_;
  std::ofstream text_;
  Console log_console_;
};

}  // namespace fathom
