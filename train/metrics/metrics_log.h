// metrics.jsonl: the truth about a run, one JSON object a line, appended in whole lines.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "train/metrics/record.h"

namespace fathom {

class MetricsLog {
 public:
  /// Opens `path` for a run that continues after `step` optimizer steps (0: a new run). Step and evaluation
  /// lines after that step are dropped, so that a killed and resumed run has one monotone history; event
  /// lines stay; a torn last line goes. The file is replaced as a whole or not at all. UserError: unreadable,
  /// unwritable, or a bad line.
  explicit MetricsLog(std::filesystem::path path, std::int64_t step = 0);
  ~MetricsLog();
  MetricsLog(MetricsLog&& other) noexcept;
  MetricsLog& operator=(MetricsLog&&) = delete;

  /// Appends one line. It survives kill -9 from here on. UserError names the path when the disk is full.
  void append(const StepRecord& record);
  void append(const EvalRecord& record);
  void append(EventRecord record);

  /// Makes everything written so far survive a power failure; call it before a checkpoint is declared
  /// complete.
  void sync();

  const std::filesystem::path& path() const { return path_; }

 private:
  void append_line(std::string line);

  std::filesystem::path path_;
  int fd_ = -1;
};

struct Metrics {
  std::vector<StepRecord> steps;
  std::vector<EvalRecord> evals;
  std::vector<EventRecord> events;
  bool torn_last_line = false;  // the writer was killed within its last line, which is left out
};

/// Reads metrics.jsonl. A torn last line is left out; a bad line elsewhere is a UserError with path and line
/// number. Unknown keys, and lines of unknown kinds, are ignored.
Metrics read_metrics(const std::filesystem::path& path);

}  // namespace fathom
