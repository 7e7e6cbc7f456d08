#include "train/durable_file.h"

#include <cerrno>
#include <cstring>
#include <string>

#include <fcntl.h>
#include <unistd.h>

#include "kernels/error.h"

namespace fathom {
namespace {

[[noreturn]] void fail(const char* what, const std::filesystem::path& path, int error) {
  const char* hint = error == ENOSPC || error == EDQUOT ? "The disk is full: free some space and start again."
                     : error == EACCES || error == EPERM || error == EROFS
                         ? "Check the permissions of the folder, or choose another one."
                         : "";
  throw UserError(std::string("cannot ") + what + " " + path.string() + ": " + std::strerror(error) + ".",
                  hint);
}

// A renamed file is durable once its folder is.
void sync_folder(const std::filesystem::path& folder) {
  const int fd = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) fail("open", folder, errno);
  const int status = ::fsync(fd);
  const int error = errno;
  ::close(fd);
  // Some file systems cannot sync a folder and say so with EINVAL; there is nothing more to do on them.
  if (status != 0 && error != EINVAL) fail("sync", folder, error);
}

}  // namespace

void write_fully(int fd, std::string_view bytes, const std::filesystem::path& path) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail("write", path, errno);
    if (n == 0) fail("write", path, ENOSPC);
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
}

void write_file_durably(const std::filesystem::path& path, std::string_view bytes) {
  const std::filesystem::path temporary = path.string() + ".tmp" + std::to_string(::getpid());
  const int fd = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) fail("write", path, errno);
  try {
    write_fully(fd, bytes, path);
    if (::fsync(fd) != 0) fail("sync", path, errno);
  } catch (...) {
    ::close(fd);
    ::unlink(temporary.c_str());
    throw;
  }
  if (::close(fd) != 0 || ::rename(temporary.c_str(), path.c_str()) != 0) {
    const int error = errno;
    ::unlink(temporary.c_str());
    fail("write", path, error);
  }
  sync_folder(path.has_parent_path() ? path.parent_path() : std::filesystem::path("."));
}

}  // namespace fathom
