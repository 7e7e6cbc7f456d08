#include "train/comm/nccl_transport.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include <fmt/format.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/handles.h"
#include "kernels/cuda/nccl_library.h"
#include "kernels/cuda/nccl_query.h"
#include "train/comm/rank_error.h"

namespace fathom {

namespace {

using cuda::nccl;
using std::chrono::milliseconds;
using std::chrono::seconds;
using Clock = std::chrono::steady_clock;

constexpr milliseconds kLook{50};  // after others and NCCL's own troubles, while something is waited for
constexpr seconds kToBeFound{1};   // by the watch, when NCCL finds that something is wrong
constexpr seconds kMostAPoll{1};   // of waiting: what is more, this process or its machine was stopped for
constexpr seconds kToAbort{5};     // then the process ends without having freed what NCCL holds

// "unhandled system error: ...", with what NCCL says of it.
std::string words_of(ncclResult_t code, ncclComm_t comm) {
  std::string words = nccl().get_error_string(code);
  const char* more = nccl().get_last_error(comm);
  if (more != nullptr && *more != '\0') words += fmt::format(" ({})", more);
  while (!words.empty() && words.back() == '\n') words.pop_back();
  return words;
}

// Whether another rank's end shows as this.
bool is_of_others(ncclResult_t code) { return code == ncclRemoteError || code == ncclSystemError; }

ncclDataType_t type_of(const char* op, DType dtype) {
  switch (dtype) {
    case DType::F32:
      return ncclFloat32;
    case DType::F64:
      return ncclFloat64;
    case DType::BF16:
      return ncclBfloat16;
    default:
      throw InternalError(fmt::format("[{}] of {}", op, name_of(dtype)));
  }
}

// A call of NCCL's that may wait for other ranks, in a thread of its own. Given up, it goes on alone.
class Call {
 public:
  explicit Call(std::function<ncclResult_t()> call) : state_(std::make_shared<State>()) {
    std::thread([state = state_, call = std::move(call)] {
      const ncclResult_t result = call();
      {
        const std::lock_guard lock(state->mutex);
        state->result = result;
        state->over = true;
      }
      state->changed.notify_all();
    }).detach();
  }
  bool over_within(Clock::duration time) const {
    std::unique_lock lock(state_->mutex);
    return state_->changed.wait_for(lock, time, [this] { return state_->over; });
  }
  ncclResult_t result() const {
    const std::lock_guard lock(state_->mutex);
    return state_->result;
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    bool over = false;
    ncclResult_t result = ncclSuccess;
  };
  std::shared_ptr<State> state_;
};

void on_device(int device) { cuda::check(cudaSetDevice(device), "nccl"); }

// A word that all ranks have alike: rank 0's.
ncclUniqueId meeting_point(Communicator& ranks) {
  ncclUniqueId id{};
  if (ranks.rank() == 0) {
    const ncclResult_t code = nccl().get_unique_id(&id);
    if (code != ncclSuccess)
      throw UserError(
          fmt::format("NCCL finds no network by which the GPUs could meet: {}.", words_of(code, nullptr)),
          "NCCL_SOCKET_IFNAME names the interface, and NCCL_DEBUG=INFO makes NCCL say more.");
  }
  return value_of_rank_0(ranks, id);
}

void require_same_version(Communicator& ranks) {
  const std::string mine = cuda::nccl_version();
  const std::string first = text_of_rank_0(ranks, mine);
  if (mine == first) return;
  throw UserError(fmt::format("Rank {} ({}) has NCCL {}, and rank 0 has {}.", ranks.rank(),
                              ranks.where(ranks.rank()), mine, first),
                  "Install the same one on all hosts, or name it in the environment variable FATHOM_NCCL.");
}

// The network is the usual reason where nothing fails and nothing comes.
[[noreturn]] void fail_to_connect(int ranks, const std::string& why) {
  throw UserError(fmt::format("NCCL could not connect the GPUs of the {} ranks: {}.", ranks, why),
                  "Each rank needs a GPU of its own, and their hosts a network that reaches all of them: "
                  "NCCL_SOCKET_IFNAME names its interface. NCCL_DEBUG=INFO in the environment makes NCCL say "
                  "more.");
}

ncclComm_t connect(Communicator& ranks, int device, double timeout) {
  const ncclUniqueId id = meeting_point(ranks);
  const auto comm = std::make_shared<ncclComm_t>();
  const Call init([=, size = ranks.size(), rank = ranks.rank()] {
    if (cudaSetDevice(device) != cudaSuccess) return ncclUnhandledCudaError;
    return nccl().comm_init_rank(comm.get(), size, id, rank);
  });
  ranks.enter();
  const std::chrono::duration<double> limit(kRankPatience * timeout);
  Clock::duration waited{};
  for (Clock::time_point looked = Clock::now(); !init.over_within(kLook);) {
    ranks.check();
    waited += std::min<Clock::duration>(Clock::now() - looked, kMostAPoll);
    looked = Clock::now();
    if (waited > limit)
      fail_to_connect(ranks.size(), fmt::format("it has not within {:g} s ({:g} times train.rank_timeout)",
                                                limit.count(), kRankPatience));
  }
  ranks.leave();
  const ncclResult_t code = init.result();
  if (code == ncclSuccess) return *comm;
  const std::string words = words_of(code, nullptr);
  // It may be another rank's end that shows here.
  for (const Clock::time_point end = Clock::now() + kToBeFound; Clock::now() < end;) {
    ranks.check();
    std::this_thread::sleep_for(kLook);
  }
  fail_to_connect(ranks.size(), words);
}

class NcclTransport final : public DeviceTransport {
 public:
  NcclTransport(Communicator& ranks, std::shared_ptr<Backend> owner, cuda::CudaBackend& backend,
                double timeout)
      : owner_(std::move(owner)),
        backend_(backend),
        rank_(ranks.rank()),
        exceptions_(std::uncaught_exceptions()) {
    on_device(backend.device());
    // Its few blocks are not to stand behind the many of a large product.
    int least = 0, greatest = 0;
    cuda::check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "nccl");
    cudaStream_t stream = nullptr;
    cuda::check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest), "nccl");
    stream_.reset(stream);
    ready_ = cuda::make_event("nccl", cudaEventDisableTiming);
    done_ = cuda::make_event("nccl", cudaEventDisableTiming);
    comm_ = connect(ranks, backend.device(), timeout);
  }

  ~NcclTransport() override {
    if (std::uncaught_exceptions() > exceptions_) abort();
    if (!aborted_) {
      cudaStreamSynchronize(stream_.get());
      nccl().comm_destroy(comm_);
    } else if (!abort_ || !abort_->over_within(kToAbort)) {
      // What may still be at work there, the process takes with it.
      static_cast<void>(stream_.release());
      static_cast<void>(ready_.release());
      static_cast<void>(done_.release());
    }
  }

  std::string description() const override { return "NCCL " + cuda::nccl_version(); }

  void all_reduce(View values) override {
    const auto type = type_of("all_reduce", values.dtype);
    begin("all_reduce", [&] {
      return nccl().all_reduce(values.data, values.data, elements(values), type, ncclSum, comm_,
                               stream_.get());
    });
  }

  void reduce_scatter(View values, std::span<const std::int64_t> counts) override {
    const auto type = type_of("reduce_scatter", values.dtype);
    if (are_equal(counts)) {
      const auto own = static_cast<std::size_t>(counts[0]);
      void* const mine = at(values, offset_of(counts, rank_));
      begin("reduce_scatter", [&] {
        return nccl().reduce_scatter(values.data, mine, own, type, ncclSum, comm_, stream_.get());
      });
      return;
    }
    each_part("reduce_scatter", values, counts, [&](void* part, std::size_t count, int root) {
      return nccl().reduce(part, part, count, type, ncclSum, root, comm_, stream_.get());
    });
  }

  void all_gather(View values, std::span<const std::int64_t> counts) override {
    const std::size_t element = size_of(values.dtype);
    if (are_equal(counts)) {
      const std::size_t bytes = static_cast<std::size_t>(counts[0]) * element;
      const void* const mine = at(values, offset_of(counts, rank_));
      begin("all_gather",
            [&] { return nccl().all_gather(mine, values.data, bytes, ncclUint8, comm_, stream_.get()); });
      return;
    }
    each_part("all_gather", values, counts, [&](void* part, std::size_t count, int root) {
      return nccl().broadcast(part, part, count * element, ncclUint8, root, comm_, stream_.get());
    });
  }

  void broadcast(View values, int root) override {
    const std::size_t bytes = elements(values) * size_of(values.dtype);
    begin("broadcast", [&] {
      return nccl().broadcast(values.data, values.data, bytes, ncclUint8, root, comm_, stream_.get());
    });
  }

  // Only behind a collective: this stream may take part in a capture only where the backend's has led it in.
  void finish() override {
    if (!std::exchange(under_way_, false) || aborted_) return;
    cuda::check(cudaEventRecord(done_.get(), stream_.get()), "nccl");
    cuda::check(cudaStreamWaitEvent(backend_.stream(), done_.get(), 0), "nccl");
  }

  void set_while_waiting(std::function<void(double seconds)> look) override {
    backend_.set_while_waiting(std::move(look));
  }

  std::string trouble() override {
    const Clock::time_point now = Clock::now();
    if (aborted_ || now - looked_ < kLook) return "";
    looked_ = now;
    ncclResult_t found = ncclSuccess;
    const ncclResult_t code = nccl().comm_get_async_error(comm_, &found);
    const ncclResult_t worse = code != ncclSuccess ? code : found;
    return worse == ncclSuccess || worse == ncclInProgress ? "" : "NCCL: " + words_of(worse, comm_);
  }

  // NCCL tells its kernels at once, and then waits until no captured work needs it any more, which the
  // caller's way out sees to: so it waits elsewhere.
  void abort() noexcept override {
    if (std::exchange(aborted_, true)) return;
    try {
      abort_.emplace([comm = comm_, device = backend_.device()] {
        cudaSetDevice(device);
        return nccl().comm_abort(comm);
      });
    } catch (...) {  // NOLINT: no thread is left; the watch ends the process
    }
  }

 private:
  static std::size_t elements(View v) { return static_cast<std::size_t>(v.size); }
  static void* at(View v, std::int64_t element) {
    return static_cast<std::byte*>(v.data) + static_cast<std::size_t>(element) * size_of(v.dtype);
  }
  static bool are_equal(std::span<const std::int64_t> counts) {
    return std::all_of(counts.begin(), counts.end(), [&](std::int64_t n) { return n == counts[0]; });
  }

  // On the own stream, behind all that the backend was asked for.
  template <typename Enqueue>
  void begin(const char* op, const Enqueue& enqueue) {
    if (aborted_) throw RankError(fmt::format("{} after what the GPUs had under way was aborted", op));
    cuda::check(cudaEventRecord(ready_.get(), backend_.stream()), op);
    cuda::check(cudaStreamWaitEvent(stream_.get(), ready_.get(), 0), op);
    under_way_ = true;
    require(op, enqueue());
  }

  // Parts of several sizes, in one launch.
  template <typename Enqueue>
  void each_part(const char* op, View values, std::span<const std::int64_t> counts, const Enqueue& enqueue) {
    begin(op, [&] {
      ncclResult_t worst = nccl().group_start();
      for (int r = 0; r < static_cast<int>(counts.size()) && worst == ncclSuccess; ++r) {
        const auto count = static_cast<std::size_t>(counts[static_cast<std::size_t>(r)]);
        if (count > 0) worst = enqueue(at(values, offset_of(counts, r)), count, r);
      }
      const ncclResult_t ended = nccl().group_end();
      return worst != ncclSuccess ? worst : ended;
    });
  }

  void require(const char* op, ncclResult_t code) const {
    if (code == ncclSuccess) return;
    const std::string words = fmt::format("[{}] NCCL: {}", op, words_of(code, comm_));
    if (is_of_others(code)) throw RankError(words);
    cuda::fail_library(words);
  }

  std::shared_ptr<Backend> owner_;
  cuda::CudaBackend& backend_;
  int rank_;
  int exceptions_;
  cuda::StreamHandle stream_;
  cuda::EventHandle ready_;  // what the backend had been given
  cuda::EventHandle done_;   // what this stream had
  ncclComm_t comm_ = nullptr;
  bool under_way_ = false;  // since finish()
  bool aborted_ = false;
  std::optional<Call> abort_;
  Clock::time_point looked_;
};

}  // namespace

std::unique_ptr<DeviceTransport> make_nccl_transport(Communicator& ranks, std::shared_ptr<Backend> backend,
                                                     double timeout) {
  auto* cuda_backend = dynamic_cast<cuda::CudaBackend*>(backend.get());
  if (cuda_backend == nullptr) throw InternalError("[nccl] the backend is " + backend->description());
  nccl();  // who has none says so before the others wait for it
  require_same_version(ranks);
  return std::make_unique<NcclTransport>(ranks, std::move(backend), *cuda_backend, timeout);
}

}  // namespace fathom
