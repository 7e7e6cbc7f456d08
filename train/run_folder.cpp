#include "train/run_folder.h"

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <fstream>
#include <optional>
#include <utility>

#include <fcntl.h>
#include <fmt/core.h>
#include <sys/file.h>
#include <unistd.h>

#include "kernels/error.h"
#include "src/io/atomic_file.h"
#include "src/model/model_tokenizer.h"

namespace fathom {
namespace {

namespace fs = std::filesystem;

void create_folder(const fs::path& path) {
  std::error_code error;
  require_no_file(path);
  fs::create_directories(path, error);
  if (error) {
    throw UserError("cannot create the run folder " + path.string() + ": " + error.message() + ".",
                    "Give a folder that you may write to.");
  }
}

std::string owner_of(int lock_fd) {
  char text[32] = {};
  const ssize_t n = ::pread(lock_fd, text, sizeof text - 1, 0);
  const std::string pid(text, n > 0 ? static_cast<std::size_t>(std::strcspn(text, "\n")) : 0);
  return pid.empty() ? "unknown" : pid;
}

// The lock is the kernel's (flock), so a killed training leaves none behind; the file's text only names the
// owner.
int lock(const fs::path& folder) {
  const fs::path path = folder / ".lock";
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0) {
    throw UserError("cannot write in the run folder " + folder.string() + ": " + std::strerror(errno) + ".",
                    "Give a folder that you may write to.");
  }
  if (::flock(fd, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    const std::string owner = owner_of(fd);
    ::close(fd);
    if (error == EWOULDBLOCK) {
      throw UserError(
          "the run folder " + folder.string() + " is in use by another training (process " + owner + ").",
          "Wait for it, stop it, or choose another --run-dir.");
    }
    throw UserError("cannot lock " + path.string() + ": " + std::strerror(error) + ".",
                    "Choose a run folder on a file system that supports flock.");
  }
  const std::string pid = std::to_string(::getpid()) + "\n";
  if (::ftruncate(fd, 0) != 0 ||
      ::pwrite(fd, pid.data(), pid.size(), 0) != static_cast<ssize_t>(pid.size())) {
    const int error = errno;
    ::close(fd);
    throw UserError("cannot write " + path.string() + ": " + std::strerror(error) + ".",
                    "The disk may be full, or the folder read-only.");
  }
  return fd;
}

std::string checkpoint_name(std::int64_t step) { return fmt::format("step_{:08}.h5", step); }

// The step in "step_00001000.h5", or nothing for any other name.
std::optional<std::int64_t> step_of(const std::string& name) {
  constexpr std::string_view prefix = "step_", suffix = ".h5";
  if (name.size() <= prefix.size() + suffix.size() || !name.starts_with(prefix) || !name.ends_with(suffix))
    return {};
  const char* const begin = name.data() + prefix.size();
  const char* const end = name.data() + name.size() - suffix.size();
  std::int64_t step = 0;
  const auto [rest, error] = std::from_chars(begin, end, step);
  if (error != std::errc{} || rest != end || step < 0) return {};
  return step;
}

// A killed training may leave a half-written checkpoint under its temporary name. Only the owner of the lock
// may do this.
void remove_temporaries(const fs::path& folder) {
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    const bool ours = name.starts_with("step_") || name.starts_with("latest.") ||
                      name.starts_with("metrics.jsonl.") || name.starts_with("tokenizer.");
    if (ours && name.find(".tmp") != std::string::npos) fs::remove(entry.path(), error);
  }
}

void remove_checkpoint(const fs::path& path) {
  std::error_code error;
  fs::remove(path, error);
  if (error) throw UserError("cannot remove the checkpoint " + path.string() + ": " + error.message() + ".");
}

}  // namespace

RunFolder RunFolder::create_or_open(const fs::path& path) {
  create_folder(path);
  RunFolder folder(path, lock(path));
  create_folder(folder.checkpoints_path());
  remove_temporaries(folder.path());
  remove_temporaries(folder.checkpoints_path());
  return folder;
}

RunFolder::~RunFolder() {
  if (lock_fd_ >= 0) ::close(lock_fd_);
}

RunFolder::RunFolder(RunFolder&& other) noexcept
    : path_(std::move(other.path_)), lock_fd_(std::exchange(other.lock_fd_, -1)) {}

fs::path RunFolder::tokenizer_path(const std::string& kind) const {
  return path_ / tokenizer_copy_name(kind);
}

fs::path RunFolder::checkpoint_path(std::int64_t step) const {
  return checkpoints_path() / checkpoint_name(step);
}

std::vector<CheckpointFile> RunFolder::checkpoints() const { return list_checkpoints(path_); }

void RunFolder::set_latest(std::int64_t step) const {
  write_file(latest_path().string(), checkpoint_name(step) + "\n");
}

void RunFolder::prune(std::int64_t keep) const {
  if (keep < 1) return;
  std::string latest;
  std::ifstream in(latest_path());
  std::getline(in, latest);
  const std::vector<CheckpointFile> files = checkpoints();
  for (std::size_t i = 0; i + static_cast<std::size_t>(keep) < files.size(); ++i) {
    if (files[i].path.filename() != latest) remove_checkpoint(files[i].path);
  }
}

void RunFolder::set_aside(const fs::path& checkpoint) const {
  std::error_code error;
  fs::rename(checkpoint, checkpoint.string() + ".damaged", error);
  if (error) {
    throw UserError("cannot rename the damaged checkpoint " + checkpoint.string() + ": " + error.message() +
                    ".");
  }
}

void require_no_file(const fs::path& run) {
  std::error_code error;
  if (!fs::exists(run, error) || fs::is_directory(run, error)) return;
  throw UserError("the run folder " + run.string() + " is a file.",
                  "Give a folder, or a path that does not exist yet.");
}

bool has_history(const fs::path& run) {
  std::error_code error;
  const fs::path metrics = run / "metrics.jsonl";
  const bool recorded = fs::exists(metrics, error) && fs::file_size(metrics, error) > 0;
  return recorded || !list_checkpoints(run).empty();
}

bool is_run_folder(const fs::path& path) {
  std::error_code error;
  if (!fs::is_directory(path, error)) return false;
  return fs::is_regular_file(path / "metrics.jsonl", error) ||
         (fs::is_regular_file(path / "config.yaml", error) && fs::is_directory(path / "checkpoints", error));
}

std::vector<CheckpointFile> list_checkpoints(const fs::path& run) {
  const fs::path folder = run / "checkpoints";
  std::vector<CheckpointFile> out;
  std::error_code error;
  if (!fs::exists(folder, error)) return out;
  fs::directory_iterator it(folder, error);
  for (; !error && it != fs::directory_iterator(); it.increment(error)) {
    const std::optional<std::int64_t> step = step_of(it->path().filename().string());
    if (step && it->is_regular_file()) out.push_back({*step, it->path()});
  }
  if (error)
    throw UserError("cannot list the checkpoints in " + folder.string() + ": " + error.message() + ".");
  std::sort(out.begin(), out.end(), [](const auto& a, const auto& b) { return a.step < b.step; });
  return out;
}

}  // namespace fathom
