#include "train/metrics/recorder.h"

#include <cerrno>
#include <cstring>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

namespace {

std::ofstream open_log(const std::filesystem::path& path) {
  std::ofstream log(path, std::ios::app);
  if (!log) {
    throw UserError(fmt::format("cannot write {}: {}.", path.string(), std::strerror(errno)),
                    "Check the permissions of the run folder.");
  }
  return log;
}

}  // namespace

Recorder::Recorder(const RunFolder& folder, std::int64_t step, std::int64_t total_steps, Console& console)
    : log_(folder.metrics_path(), step),
      tensorboard_(folder.path(), step),
      console_(console),
      text_(open_log(folder.log_path())),
      log_console_(text_, ConsoleOptions{.kind = ConsoleKind::Pipe, .total_steps = total_steps}) {}

void Recorder::record(const StepRecord& record) {
  log_.append(record);
  tensorboard_.add(record);
  console_.step(record);
  log_console_.step(record);
}

void Recorder::record(const EvalRecord& record) {
  log_.append(record);
  tensorboard_.add(record);
  console_.evaluation(record);
  log_console_.evaluation(record);
}

void Recorder::record(const EventRecord& record) {
  log_.append(record);
  console_.event(record);
  log_console_.event(record);
}

void Recorder::message(const std::string& text) {
  console_.message(text);
  log_console_.message(text);
}

}  // namespace fathom
