#include "src/io/atomic_file.h"

#include <cerrno>
#include <cstring>
#include <filesystem>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"

namespace fathom {

namespace {

// A write error must not be mistaken for success: short writes are continued, EINTR repeated.
void write_all(int fd, std::span<const std::byte> bytes, std::int64_t offset, const std::string& path) {
  while (!bytes.empty()) {
    const ssize_t n = offset < 0 ? ::write(fd, bytes.data(), bytes.size())
                                 : ::pwrite(fd, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) AtomicFile::fail(path, "cannot write", errno);
    if (n == 0) AtomicFile::fail(path, "cannot write", ENOSPC);
    bytes = bytes.subspan(static_cast<std::size_t>(n));
    if (offset >= 0) offset += n;
  }
}

std::string folder_of(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

// The folder's entry has to reach the disk as well, or a power cut may bring the old name back.
void sync_folder(const std::string& path) {
  const std::string folder = folder_of(path);
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  const int status = fd < 0 ? -1 : ::fsync(fd);
  const int error = errno;
  if (fd >= 0) ::close(fd);
  // Some file systems do not offer fsync on folders; they say so with EINVAL.
  if (status == 0 || error == EINVAL) return;
  throw UserError(fmt::format("cannot flush the folder of {}: {}.", path, std::strerror(error)),
                  "The new file is in place, but a power cut may bring the old one back.");
}

}  // namespace

void AtomicFile::fail(const std::string& path, const char* what, int error) {
  std::string hint = "What was at that path before is unchanged.";
  if (error == ENOSPC || error == EDQUOT || error == EFBIG)
    hint = "Free some space or write elsewhere. " + hint;
  throw UserError(fmt::format("{} {}: {}.", what, path, std::strerror(error)), hint);
}

std::string AtomicFile::temporary_of(const std::string& path) { return path + ".tmp"; }

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)), temporary_(temporary_of(path_)) {
  struct stat target {};
  if (::stat(path_.c_str(), &target) == 0 && !S_ISREG(target.st_mode)) {
    throw UserError(fmt::format("cannot write {}: it exists and is not a regular file.", path_),
                    "Give the path of a file.");
  }
  for (;;) {
    fd_ = ::open(temporary_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd_ < 0) {
      const int error = errno;
      if (error == ENOENT) {
        throw UserError(
            fmt::format("cannot write {}: the folder {} does not exist.", path_, folder_of(path_)),
            "Create it first.");
      }
      fail(path_, "cannot write", error);
    }
    const int locked = ::flock(fd_, LOCK_EX | LOCK_NB);
    if (locked != 0 && errno == EWOULDBLOCK) {
      ::close(fd_);
      fd_ = -1;
      throw UserError(fmt::format("another process is writing {} now ({} is locked).", path_, temporary_),
                      "Wait for it, or write elsewhere.");
    }
    // Between open and lock the other writer may have renamed this very file to its final name: then it is
    // not ours.
    struct stat by_fd {};
    struct stat by_name {};
    if (::fstat(fd_, &by_fd) == 0 && ::stat(temporary_.c_str(), &by_name) == 0 &&
        by_fd.st_ino == by_name.st_ino && by_fd.st_dev == by_name.st_dev) {
      break;
    }
    ::close(fd_);
    fd_ = -1;
  }
  if (::ftruncate(fd_, 0) != 0) {
    const int error = errno;
    ::unlink(temporary_.c_str());
    ::close(fd_);
    fd_ = -1;
    fail(path_, "cannot write", error);
  }
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::unlink(temporary_.c_str());
  ::close(fd_);
}

void write_fully(int fd, std::string_view bytes, const std::string& path) {
  write_all(fd, std::as_bytes(std::span(bytes)), -1, path);
}

void AtomicFile::write(std::span<const std::byte> bytes) { write_all(fd_, bytes, -1, path_); }
void AtomicFile::write(std::string_view text) { write(std::as_bytes(std::span(text))); }
void AtomicFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
  write_all(fd_, bytes, static_cast<std::int64_t>(offset), path_);
}

void AtomicFile::flush() {
  if (fd_ < 0) throw InternalError("[AtomicFile] committed already: " + path_);
  if (::fsync(fd_) != 0) fail(path_, "cannot flush", errno);
}

void AtomicFile::commit() {
  flush();
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail(path_, "cannot replace", errno);
  const int fd = fd_;
  fd_ = -1;  // the name is the final one now: the destructor must not remove anything
  if (::close(fd) != 0) fail(path_, "cannot close", errno);
  sync_folder(path_);
}

void write_file(const std::string& path, std::string_view text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

void remove_file(const std::string& path) {
  if (::unlink(path.c_str()) == 0) {
    sync_folder(path);
  } else if (errno != ENOENT) {
    AtomicFile::fail(path, "cannot remove", errno);
  }
}

std::string read_file(const std::string& path, const std::string& kind) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) throw UserError(fmt::format("cannot open the {} {}: {}.", kind, path, std::strerror(errno)));
  std::string text;
  std::string buffer(std::size_t{1} << 16, '\0');
  for (;;) {
    const ssize_t n = ::read(fd, buffer.data(), buffer.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const int error = errno;
      ::close(fd);
      throw UserError(fmt::format("cannot read the {} {}: {}.", kind, path, std::strerror(error)));
    }
    if (n == 0) break;
    text.append(buffer.data(), static_cast<std::size_t>(n));
  }
  ::close(fd);
  return text;
}

}  // namespace fathom
