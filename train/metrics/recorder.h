// One call from the trainer for each thing that happens: metrics.jsonl, TensorBoard and the console get it.
#pragma once

#include "train/metrics/console.h"
#include "train/metrics/metrics_log.h"
#include "train/metrics/tensorboard.h"
#include "train/run_folder.h"

namespace fathom {

class Recorder {
 public:
  /// `step`: steps done before this part of the run; see MetricsLog and TensorBoardWriter. `console` outlives
  /// this.
  Recorder(const RunFolder& folder, std::int64_t step, Console& console);

  void record(const StepRecord& record);
  void record(const EvalRecord& record);
  void record(const EventRecord& record);
  void sync() { log_.sync(); }

 private:
  MetricsLog log_;
  TensorBoardWriter tensorboard_;
  Console& console_;
};

}  // namespace fathom
