#include "train/metrics/recorder.h"

namespace fathom {

Recorder::Recorder(const RunFolder& folder, std::int64_t step, Console& console)
    : log_(folder.metrics_path(), step), tensorboard_(folder.path(), step), console_(console) {}

void Recorder::record(const StepRecord& record) {
  log_.append(record);
  tensorboard_.add(record);
  console_.step(record);
}

void Recorder::record(const EvalRecord& record) {
  log_.append(record);
  tensorboard_.add(record);
  console_.evaluation(record);
}

void Recorder::record(const EventRecord& record) {
  log_.append(record);
  console_.event(record);
}

}  // namespace fathom
