// A file that is complete or absent: written under a temporary name in the same folder, flushed to the disk,
// renamed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace fathom {

/// Until `commit` returns, whatever was at `path` before is untouched; without it the temporary file is
/// removed.
///
/// The temporary's name is `path` + ".tmp", locked while it is being written: a second writer of the same
/// path gets a UserError, and what a killed process left behind is overwritten by the next one. Every failure
/// of the system (disk full, no permission, ...) is a UserError that names the path and the reason.
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  const std::string& path() const { return path_; }
  int fd() const { return fd_; }

  /// Appends at the file's current position.
  void write(std::span<const std::byte> bytes);
  void write(std::string_view text);
  /// Writes at `offset`, without moving the position.
  void write_at(std::uint64_t offset, std::span<const std::byte> bytes);

  /// fsync: what the disk may refuse is behind us, and only the name is left to commit. Nothing may be
  /// written afterwards.
  void flush();
  /// flush, rename over `path`, fsync of the folder.
  void commit();

  /// The name that what becomes `path` has until commit.
  static std::string temporary_of(const std::string& path);
  /// Throws the UserError for a failed write of `path`; `error` is an errno.
  [[noreturn]] static void fail(const std::string& path, const char* what, int error);

 private:
  std::string path_;
  std::string temporary_;
  int fd_ = -1;
};

/// Replaces the file at `path` by `text`, atomically.
void write_file(const std::string& path, std::string_view text);

/// Removes the file at `path`, if there is one, and flushes its folder.
void remove_file(const std::string& path);

/// Appends all of `bytes` to an open file; interrupted and short writes are continued. `path` is for the
/// UserError.
void write_fully(int fd, std::string_view bytes, const std::string& path);

/// The whole file. A UserError names what `kind` of file was expected when it cannot be read.
std::string read_file(const std::string& path, const std::string& kind);

}  // namespace fathom
