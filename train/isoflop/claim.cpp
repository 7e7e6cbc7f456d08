#include "train/isoflop/claim.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <fstream>
#include <mutex>
#include <thread>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/error.h"
#include "src/io/atomic_file.h"

namespace fathom::isoflop {
namespace {

namespace fs = std::filesystem;

fs::path with(const fs::path& base, const char* ending) { return base.string() + ending; }

std::string host_name() {
  char name[256] = {};
  return ::gethostname(name, sizeof name - 1) == 0 && name[0] != '\0' ? name : "unknown";
}

double seconds_of(const timespec& t) {
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

std::optional<double> touched_at(const fs::path& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return std::nullopt;
  return seconds_of(status.st_mtim);
}

// The file system's present, which on a shared folder is not this machine's clock.
double file_system_now(const fs::path& base) {
  const fs::path probe = with(base, fmt::format(".now.{}.{}", host_name(), ::getpid()).c_str());
  const int fd = ::open(probe.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  timespec now{};
  ::clock_gettime(CLOCK_REALTIME, &now);
  double seconds = seconds_of(now);
  if (fd >= 0) {
    ::futimens(fd, nullptr);
    seconds = touched_at(probe).value_or(seconds);
    ::close(fd);
    ::unlink(probe.c_str());
  }
  return seconds;
}

std::optional<Owner> read_owner(const fs::path& base) {
  const fs::path path = with(base, ".owner");
  const std::optional<double> touched = touched_at(path);
  std::ifstream in(path);
  Owner owner;
  if (!touched || !std::getline(in, owner.machine)) return std::nullopt;
  std::getline(in, owner.text);
  owner.age_seconds = std::max(0.0, file_system_now(base) - *touched);
  return owner;
}

int open_lock(const fs::path& base) {
  const fs::path path = with(base, ".lock");
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0) AtomicFile::fail(path.string(), "cannot open", errno);
  return fd;
}

// False: another process holds it. A `status` that looks whether a lock is held has it for a moment, so one
// refusal is none.
bool try_lock(int fd, const fs::path& base) {
  for (int attempt = 0; attempt < 4; ++attempt) {
    if (attempt > 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    if (::flock(fd, LOCK_EX | LOCK_NB) == 0) return true;
    if (errno != EWOULDBLOCK && errno != EINTR) break;
    if (attempt == 3) return false;
  }
  throw UserError(fmt::format("cannot lock {}: {}.", with(base, ".lock").string(), std::strerror(errno)),
                  "Put the sweep's folder on a file system that supports flock.");
}

// Under the lock: makes the owner's file anew. False: another machine's worker has it, or was quicker.
bool write_owner(const fs::path& base) {
  const fs::path path = with(base, ".owner");
  const int fd = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd < 0 && errno == EEXIST) return false;
  if (fd < 0) AtomicFile::fail(path.string(), "cannot create", errno);
  try {
    write_fully(fd, fmt::format("{}\n{}, process {}\n", this_machine(), host_name(), ::getpid()),
                path.string());
  } catch (const UserError&) {
    ::close(fd);
    ::unlink(path.c_str());
    throw;
  }
  ::close(fd);
  return true;
}

}  // namespace

std::string this_machine() {
  std::string boot;
  std::ifstream in("/proc/sys/kernel/random/boot_id");
  std::getline(in, boot);
  return host_name() + " " + boot;
}

struct Claim::Held {
  Held(fs::path b, int lock_fd, const ClaimTimes& times) : base(std::move(b)), fd(lock_fd) {
    heart = std::thread([this, every = std::chrono::duration<double>(times.heartbeat_seconds)] {
      std::unique_lock<std::mutex> guard(mutex);
      while (!stopping.wait_for(guard, every, [this] { return stop; })) {
        ::utimensat(AT_FDCWD, with(base, ".owner").c_str(), nullptr, 0);
      }
    });
  }
  ~Held() {
    {
      const std::lock_guard<std::mutex> guard(mutex);
      stop = true;
    }
    stopping.notify_all();
    heart.join();
    ::unlink(with(base, ".owner").c_str());
    ::close(fd);
  }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;

  fs::path base;
  int fd;
  std::mutex mutex;
  std::condition_variable stopping;
  bool stop = false;
  std::thread heart;
};

Claim::Claim(std::unique_ptr<Held> held) : held_(std::move(held)) {}
Claim::~Claim() = default;
Claim::Claim(Claim&&) noexcept = default;

std::optional<Claim> Claim::take(const fs::path& base, const ClaimTimes& times) {
  const int fd = open_lock(base);
  try {
    bool mine = try_lock(fd, base);
    if (mine) {
      const std::optional<Owner> owner = read_owner(base);
      const bool elsewhere =
          owner && owner->machine != this_machine() && owner->age_seconds < times.stale_seconds;
      mine = !elsewhere;
      // What a killed worker left.
      if (mine) ::unlink(with(base, ".owner").c_str());
      mine = mine && write_owner(base);
    }
    if (mine) return Claim(std::make_unique<Held>(base, fd, times));
  } catch (...) {
    ::close(fd);
    throw;
  }
  ::close(fd);
  return std::nullopt;
}

Claim Claim::wait_for(const fs::path& base) {
  for (int attempt = 0; attempt < 600; ++attempt) {
    if (std::optional<Claim> claim = take(base)) return std::move(*claim);
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  }
  throw UserError(
      fmt::format("{} has been held by another worker for a minute.", with(base, ".lock").string()),
      "If that worker is stopped, end it and try again.");
}

std::optional<Owner> claimed_by(const fs::path& base, const ClaimTimes& times) {
  std::optional<Owner> owner = read_owner(base);
  if (!owner) return std::nullopt;
  if (owner->machine != this_machine())
    return owner->age_seconds < times.stale_seconds ? owner : std::nullopt;
  // Of this machine the lock itself tells. Only a shared lock is tried, and let go at once.
  const int fd = ::open(with(base, ".lock").c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return std::nullopt;
  const bool held = ::flock(fd, LOCK_SH | LOCK_NB) != 0;
  ::close(fd);
  return held ? owner : std::nullopt;
}

}  // namespace fathom::isoflop
