// A run's folder: where its files are, which checkpoints it has, and the lock that keeps a second training
// out.
//
//   config.yaml  tokenizer.model (or .json)  metrics.jsonl  events.out.tfevents.*  train.log  report.html
//   checkpoints/step_00001000.h5   latest (a text file with the name of the newest checkpoint)   .lock
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace fathom {

struct CheckpointFile {
  std::int64_t step = 0;
  std::filesystem::path path;
};

class RunFolder {
 public:
  /// Creates the folder, or opens an existing one, and locks it for this process; the kernel releases the
  /// lock when the process ends, however it ends. Half-written checkpoints (*.tmp*) of a killed run are
  /// removed. UserError: not a folder, not writable, or locked by another training (the message gives its
  /// process id).
  static RunFolder create_or_open(const std::filesystem::path& path);
  ~RunFolder();
  RunFolder(RunFolder&& other) noexcept;
  RunFolder& operator=(RunFolder&&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path config_path() const { return path_ / "config.yaml"; }
  std::filesystem::path tokenizer_path(
      const std::string& kind) const;  // the run's copy; src/model/model_tokenizer.h reads it
  std::filesystem::path metrics_path() const { return path_ / "metrics.jsonl"; }
  std::filesystem::path log_path() const { return path_ / "train.log"; }
  std::filesystem::path plan_path() const { return path_ / "plan.json"; }
  std::filesystem::path samples_path() const { return path_ / "samples.txt"; }
  std::filesystem::path report_path() const { return path_ / "report.html"; }
  std::filesystem::path latest_path() const { return path_ / "latest"; }
  std::filesystem::path checkpoints_path() const { return path_ / "checkpoints"; }
  std::filesystem::path checkpoint_path(std::int64_t step) const;  // checkpoints/step_00001000.h5

  /// Complete checkpoint files by name, ascending by step.
  std::vector<CheckpointFile> checkpoints() const;
  /// Names the newest checkpoint in `latest`: temporary file, fsync, rename.
  void set_latest(std::int64_t step) const;
  /// Removes all but the newest `keep` checkpoints, never the one that `latest` names. keep < 1 keeps all.
  void prune(std::int64_t keep) const;
  /// Renames a checkpoint that cannot be read to NAME.damaged, so that nothing takes it for one any more.
  void set_aside(const std::filesystem::path& checkpoint) const;

 private:
  RunFolder(std::filesystem::path path, int lock_fd) : path_(std::move(path)), lock_fd_(lock_fd) {}

  std::filesystem::path path_;
  int lock_fd_ = -1;
};

// The same, read-only and without the lock: for eval, export, generate, report and dry runs.

/// UserError when `run` is there and no folder.
void require_no_file(const std::filesystem::path& run);
/// Whether an earlier training left something there (a metrics.jsonl or a checkpoint).
bool has_history(const std::filesystem::path& run);

/// Whether `path` looks like a run folder: a folder with a metrics.jsonl, or a config.yaml beside
/// checkpoints/.
bool is_run_folder(const std::filesystem::path& path);
/// Ascending by step. UserError when the folder cannot be read.
std::vector<CheckpointFile> list_checkpoints(const std::filesystem::path& run);

}  // namespace fathom
