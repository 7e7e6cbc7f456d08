#include "train/comm/mpi_communicator.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>
#include <utility>

#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

// The C interface alone.
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

#include "kernels/error.h"
#include "train/comm/bf16.h"
#include "train/comm/host.h"
#include "train/comm/open_communicator.h"
#include "train/comm/watched_communicator.h"

namespace fathom {

namespace {

constexpr std::int64_t kMostElements = std::int64_t{1} << 28;  // of one call: counts are int

std::string words_of(int code) {
  char text[MPI_MAX_ERROR_STRING] = {};
  int size = 0;
  MPI_Error_string(code, text, &size);
  return {text, static_cast<std::size_t>(size)};
}

void require(int code, const char* what) {
  if (code != MPI_SUCCESS) throw InternalError(fmt::format("[{}] MPI: {}", what, words_of(code)));
}

MPI_Datatype type_of(const char* what, DType dtype) {
  if (dtype == DType::F32) return MPI_FLOAT;
  if (dtype == DType::F64) return MPI_DOUBLE;
  throw InternalError(fmt::format("[{}] of {}", what, name_of(dtype)));
}

std::byte* bytes_at(View v, std::int64_t element) {
  return static_cast<std::byte*>(v.data) + static_cast<std::size_t>(element) * size_of(v.dtype);
}

// MPI_Init waits for all ranks, for ever, and does not say for which. So this ends the process, while it
// lives, when it takes too long.
class MeetingLimit {
 public:
  explicit MeetingLimit(const Launch& launch) : thread_([this, launch] { run(launch); }) {}
  ~MeetingLimit() {
    {
      const std::lock_guard lock(mutex_);
      met_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  MeetingLimit(const MeetingLimit&) = delete;
  MeetingLimit& operator=(const MeetingLimit&) = delete;

 private:
  void run(const Launch& launch) {
    std::unique_lock lock(mutex_);
    const auto limit = std::chrono::duration<double>(kRankTimeout);
    if (changed_.wait_for(lock, limit, [this] { return met_; })) return;
    const std::string text = fmt::format(
        "fathom: Rank {} ({}) waits for the other {} ranks for {:g} s, and MPI does not say which of them is "
        "missing. The launcher's own messages, or its list of processes, may.\n",
        launch.rank, host_name(), launch.size - 1, kRankTimeout);
    [[maybe_unused]] const ssize_t n = ::write(STDERR_FILENO, text.data(), text.size());
    ::_exit(1);
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool met_ = false;
  std::thread thread_;
};

class MpiCommunicator final : public WatchedCommunicator {
 public:
  explicit MpiCommunicator(const Launch& launch) {
    {
      const MeetingLimit limit(launch);
      int provided = 0;
      require(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided), "MPI_Init_thread");
    }
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    int rank = 0, size = 1;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (size != launch.size) {
      throw UserError(
          fmt::format("The launcher started {} processes, and MPI sees {} of them.", launch.size, size),
          launch.launcher == Launcher::Slurm
              ? "Start them with srun --mpi=pmix (srun --mpi=list shows what this cluster has)."
              : "Start them with the mpirun of the MPI that Fathom was built with.");
    }
    set_rank(rank, size);
    begin_watch();
  }

  // A rank that failed leaves MPI as it is: its end would wait for the others.
  ~MpiCommunicator() override {
    if (end_watch()) MPI_Finalize();
  }

  std::string description() const override {
    return fmt::format("{} ranks by MPI ({})", size(), mpi_version());
  }

  void all_reduce(View values) override {
    if (values.dtype == DType::BF16) {
      room_.resize(static_cast<std::size_t>(values.size));
      to_fp32(room_, values);
      sum({room_.data(), values.size, DType::F32});
      to_bf16(values, room_);
    } else {
      sum(values);
    }
  }

  void reduce_scatter(View values, std::span<const std::int64_t> counts) override {
    const std::int64_t own = counts[static_cast<std::size_t>(rank())];
    const std::int64_t at = offset_of(counts, rank());
    const bool is_bf16 = values.dtype == DType::BF16;
    View from = values;
    if (is_bf16) {
      room_.resize(static_cast<std::size_t>(values.size));
      to_fp32(room_, values);
      from = {room_.data(), values.size, DType::F32};
    }
    // MPI puts a rank's part at the beginning of what it is given.
    part_.resize(static_cast<std::size_t>(own) * size_of(from.dtype));
    const std::vector<int> sizes = as_int("reduce_scatter", counts);
    wait_for("reduce_scatter", [&](MPI_Request* request) {
      return MPI_Ireduce_scatter(from.data, part_.data(), sizes.data(), type_of("reduce_scatter", from.dtype),
                                 MPI_SUM, MPI_COMM_WORLD, request);
    });
    if (own > 0) std::memcpy(bytes_at(from, at), part_.data(), part_.size());
    if (is_bf16) {
      const std::span<const float> sums(room_);
      to_bf16({bytes_at(values, at), own, DType::BF16},
              sums.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(own)));
    }
  }

  void all_gather(View values, std::span<const std::int64_t> counts) override {
    std::vector<std::int64_t> bytes(counts.begin(), counts.end());
    for (std::int64_t& n : bytes) n *= static_cast<std::int64_t>(size_of(values.dtype));
    gather_bytes(static_cast<std::byte*>(values.data), bytes);
  }

  void broadcast(View values, int root) override {
    broadcast_host(
        {static_cast<std::byte*>(values.data), static_cast<std::size_t>(values.size) * size_of(values.dtype)},
        root);
  }

  void all_reduce_host(std::span<double> values, Reduce how) override {
    const auto n = static_cast<int>(values.size());
    wait_for("all_reduce_host", [&](MPI_Request* request) {
      return MPI_Iallreduce(MPI_IN_PLACE, values.data(), n, MPI_DOUBLE,
                            how == Reduce::Sum ? MPI_SUM : MPI_MAX, MPI_COMM_WORLD, request);
    });
  }

  void broadcast_host(std::span<std::byte> bytes, int root) override {
    constexpr std::size_t kMostBytes = std::size_t{1} << 30;
    for (std::size_t at = 0; at < bytes.size(); at += kMostBytes) {
      const auto n = static_cast<int>(std::min(kMostBytes, bytes.size() - at));
      wait_for("broadcast", [&](MPI_Request* request) {
        return MPI_Ibcast(bytes.data() + at, n, MPI_BYTE, root, MPI_COMM_WORLD, request);
      });
    }
  }

 private:
  // Polls, so that a rank that waits for one that is lost learns of it. The longer it waits, the more it
  // leaves the processor to others: there may be more ranks than cores.
  template <typename Begin>
  void wait_for(const char* what, const Begin& begin) {
    const InCollective waiting(*this);
    MPI_Request request = MPI_REQUEST_NULL;
    require(begin(&request), what);
    int done = 0;
    for (int polls = 0;; ++polls) {
      const int code = MPI_Test(&request, &done, MPI_STATUS_IGNORE);
      if (code != MPI_SUCCESS) lose(fmt::format("{}: {}", what, words_of(code)));
      if (done != 0) return;
      check();
      constexpr int kSpins = 200, kYields = 2000;
      if (polls > kYields) {
        std::this_thread::sleep_for(std::chrono::microseconds(100));
      } else if (polls > kSpins) {
        ::sched_yield();
      }
    }
  }

  void sum(View values) {
    for (std::int64_t at = 0; at < values.size; at += kMostElements) {
      const auto n = static_cast<int>(std::min(kMostElements, values.size - at));
      wait_for("all_reduce", [&](MPI_Request* request) {
        return MPI_Iallreduce(MPI_IN_PLACE, bytes_at(values, at), n, type_of("all_reduce", values.dtype),
                              MPI_SUM, MPI_COMM_WORLD, request);
      });
    }
  }

  void gather_bytes(std::byte* bytes, std::span<const std::int64_t> counts) override {
    const std::vector<int> sizes = as_int("all_gather", counts);
    std::vector<int> begins;
    for (int r = 0; r < size(); ++r) begins.push_back(static_cast<int>(offset_of(counts, r)));
    wait_for("all_gather", [&](MPI_Request* request) {
      return MPI_Iallgatherv(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, bytes, sizes.data(), begins.data(), MPI_BYTE,
                             MPI_COMM_WORLD, request);
    });
  }

  static std::vector<int> as_int(const char* what, std::span<const std::int64_t> counts) {
    constexpr std::int64_t kMost = 0x7fffffff;
    std::int64_t all = 0;
    for (const std::int64_t n : counts) all += n;
    if (all > kMost) throw InternalError(fmt::format("[{}] {} at once", what, all));
    return {counts.begin(), counts.end()};
  }

  std::vector<float> room_;
  std::vector<std::byte> part_;
};

}  // namespace

std::shared_ptr<Communicator> make_mpi_communicator(const Launch& launch) {
  return std::make_shared<MpiCommunicator>(launch);
}

// "Open MPI v4.1.4, package: ..." and the like.
std::string mpi_version() {
  char text[MPI_MAX_LIBRARY_VERSION_STRING] = {};
  int size = 0;
  if (MPI_Get_library_version(text, &size) != MPI_SUCCESS) return "MPI";
  const std::string_view whole(text, static_cast<std::size_t>(size));
  return std::string(whole.substr(0, whole.find_first_of(",\n")));
}

}  // namespace fathom
