#include "tests/distributed/thread_ranks.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/error.h"
#include "train/comm/bf16.h"

namespace fathom::testing {

namespace {

// Where the ranks meet: what each brought, and a barrier that breaks when one of them fails.
struct Meeting {
  explicit Meeting(int n) : size(n), brought(static_cast<std::size_t>(n)) {}

  void wait() {
    std::unique_lock lock(mutex);
    const long mine = generation;
    if (++arrived == size) {
      arrived = 0;
      ++generation;
      all.notify_all();
      return;
    }
    all.wait(lock, [&] { return generation != mine || broken; });
    if (generation == mine) throw InternalError("[ranks] another rank failed");
  }
  void fail(const std::exception_ptr& e) {
    const std::lock_guard lock(mutex);
    if (!first) first = e;
    broken = true;
    all.notify_all();
  }

  const int size;
  std::vector<const void*> brought;
  std::mutex mutex;
  std::condition_variable all;
  int arrived = 0;
  long generation = 0;
  bool broken = false;
  std::exception_ptr first;
};

class ThreadRank final : public Communicator {
 public:
  ThreadRank(int rank, Meeting& meeting) : rank_(rank), meeting_(meeting) {}

  int rank() const override { return rank_; }
  int size() const override { return meeting_.size; }
  std::string description() const override { return "threads"; }
  std::string where(int rank) const override { return "thread " + std::to_string(rank); }
  int local_rank() const override { return rank_; }
  int local_size() const override { return meeting_.size; }

  void all_reduce(View values) override { reduce(values, 0, values.size); }
  void reduce_scatter(View values, std::span<const std::int64_t> counts) override {
    const std::int64_t at = offset_of(counts, rank_), own = counts[static_cast<std::size_t>(rank_)];
    reduce(values, at, own);
    // What the others own is undefined: nobody may read it.
    const std::size_t element = size_of(values.dtype);
    auto* bytes = static_cast<std::byte*>(values.data);
    std::memset(bytes, 0xff, static_cast<std::size_t>(at) * element);
    std::memset(bytes + static_cast<std::size_t>(at + own) * element, 0xff,
                static_cast<std::size_t>(values.size - at - own) * element);
  }
  void all_gather(View values, std::span<const std::int64_t> counts) override {
    meet(values.data, [&] {
      for (int r = 0; r < size(); ++r) {
        if (r == rank_) continue;
        const auto at = static_cast<std::size_t>(offset_of(counts, r)) * size_of(values.dtype);
        std::memcpy(static_cast<std::byte*>(values.data) + at, of<std::byte>(r) + at,
                    static_cast<std::size_t>(counts[static_cast<std::size_t>(r)]) * size_of(values.dtype));
      }
    });
  }
  void broadcast(View values, int root) override {
    broadcast_host(
        {static_cast<std::byte*>(values.data), static_cast<std::size_t>(values.size) * size_of(values.dtype)},
        root);
  }
  void finish() override {}

  void all_reduce_host(std::span<double> values, Reduce how) override {
    std::vector<double> result(values.size());
    meet(values.data(), [&] {
      for (std::size_t i = 0; i < values.size(); ++i) {
        result[i] = of<double>(0)[i];
        for (int r = 1; r < size(); ++r)
          result[i] =
              how == Reduce::Sum ? result[i] + of<double>(r)[i] : std::max(result[i], of<double>(r)[i]);
      }
    });
    std::copy(result.begin(), result.end(), values.begin());
  }
  void broadcast_host(std::span<std::byte> bytes, int root) override {
    meet(bytes.data(), [&] {
      if (rank_ != root) std::memcpy(bytes.data(), of<std::byte>(root), bytes.size());
    });
  }
  std::vector<std::string> gather(const std::string& mine) override {
    std::vector<std::string> all;
    meet(&mine, [&] {
      for (int r = 0; r < size(); ++r) all.push_back(*of<std::string>(r));
    });
    return all;
  }
  void barrier() override { meeting_.wait(); }

  void set_timeout(double) override {}
  void set_progress(std::int64_t) override {}
  bool fail(const std::string&) noexcept override { return false; }

 private:
  template <typename T>
  const T* of(int rank) const {
    return static_cast<const T*>(meeting_.brought[static_cast<std::size_t>(rank)]);
  }
  template <typename F>
  void meet(const void* mine, const F& read) {
    meeting_.brought[static_cast<std::size_t>(rank_)] = mine;
    meeting_.wait();
    read();
    meeting_.wait();
  }
  template <typename T>
  void add_up(View values, std::int64_t at, std::int64_t n) {
    std::vector<T> sums(static_cast<std::size_t>(n));
    meet(values.data, [&] {
      for (int r = 0; r < size(); ++r) {
        for (std::int64_t i = 0; i < n; ++i) sums[static_cast<std::size_t>(i)] += of<T>(r)[at + i];
      }
    });
    std::copy(sums.begin(), sums.end(), static_cast<T*>(values.data) + at);
  }
  void reduce(View values, std::int64_t at, std::int64_t n) {
    if (values.dtype == DType::F32) return add_up<float>(values, at, n);
    if (values.dtype == DType::F64) return add_up<double>(values, at, n);
    if (values.dtype == DType::BF16) {
      std::vector<float> wide(static_cast<std::size_t>(values.size));
      to_fp32(wide, values);
      add_up<float>({wide.data(), values.size, DType::F32}, at, n);
      auto* own = static_cast<std::uint16_t*>(values.data) + at;
      return to_bf16({own, n, DType::BF16}, std::span<const float>(wide).subspan(
                                                static_cast<std::size_t>(at), static_cast<std::size_t>(n)));
    }
    throw InternalError("[ranks] a sum of that type");
  }

  int rank_;
  Meeting& meeting_;
};

}  // namespace

void run_as_ranks(int ranks, const std::function<void(std::shared_ptr<Communicator>)>& body) {
  Meeting meeting(ranks);
  std::vector<std::thread> threads;
  for (int r = 0; r < ranks; ++r) {
    threads.emplace_back([&, r] {
      try {
        body(std::make_shared<ThreadRank>(r, meeting));
      } catch (...) {
        meeting.fail(std::current_exception());
      }
    });
  }
  for (std::thread& t : threads) t.join();
  if (meeting.first) std::rethrow_exception(meeting.first);
}

}  // namespace fathom::testing
