#include "train/comm/device_communicator.h"

#include <algorithm>
#include <utility>

#include <fmt/format.h>

#include "train/comm/rank_error.h"

namespace fathom {

namespace {

class DeviceCommunicator final : public Communicator {
 public:
  DeviceCommunicator(std::shared_ptr<Communicator> host, std::unique_ptr<DeviceTransport> transport)
      : host_(std::move(host)), transport_(std::move(transport)) {
    transport_->set_while_waiting([this](double seconds) { look_after_others(seconds); });
  }
  ~DeviceCommunicator() override { transport_->set_while_waiting(nullptr); }

  int rank() const override { return host_->rank(); }
  int size() const override { return host_->size(); }
  std::string description() const override {
    return fmt::format("{}, their GPUs by {}", host_->description(), transport_->description());
  }
  std::string where(int rank) const override { return host_->where(rank); }
  int local_rank() const override { return host_->local_rank(); }
  int local_size() const override { return host_->local_size(); }

  void all_reduce(View values) override {
    on_devices([&] { transport_->all_reduce(values); });
  }
  void reduce_scatter(View values, std::span<const std::int64_t> counts) override {
    on_devices([&] { transport_->reduce_scatter(values, counts); });
  }
  void all_gather(View values, std::span<const std::int64_t> counts) override {
    on_devices([&] { transport_->all_gather(values, counts); });
  }
  void broadcast(View values, int root) override {
    on_devices([&] { transport_->broadcast(values, root); });
  }
  void finish() override { transport_->finish(); }

  void all_reduce_host(std::span<double> values, Reduce how) override {
    on_host([&] { host_->all_reduce_host(values, how); });
  }
  void broadcast_host(std::span<std::byte> bytes, int root) override {
    on_host([&] { host_->broadcast_host(bytes, root); });
  }
  std::vector<std::string> gather(const std::string& mine) override {
    std::vector<std::string> all;
    on_host([&] { all = host_->gather(mine); });
    return all;
  }
  void barrier() override {
    on_host([&] { host_->barrier(); });
  }

  void set_timeout(double seconds) override {
    timeout_ = seconds;
    host_->set_timeout(seconds);
  }
  void set_progress(std::int64_t step) override {
    step_ = step;
    host_->set_progress(step);
  }
  bool fail(const std::string& why) noexcept override {
    transport_->abort();
    return host_->fail(why);
  }

  void enter() override { host_->enter(); }
  void leave() noexcept override { host_->leave(); }
  void check() override {
    on_host([&] { host_->check(); });
  }
  void lose(const std::string& what) override {
    transport_->abort();
    host_->lose(what);
  }

 private:
  // The first collective of its kind waits until all have come to it.
  template <typename Begin>
  void on_devices(const Begin& begin) {
    on_host([&] { host_->enter(); });
    try {
      begin();
    } catch (const RankError& e) {
      host_->leave();
      lose(e.what());
    } catch (...) {
      host_->leave();
      throw;
    }
    host_->leave();
  }

  // Whoever is told of a loss does not get back to where the device's work would be waited for otherwise.
  template <typename Call>
  void on_host(const Call& call) {
    try {
      call();
    } catch (const RankError&) {
      transport_->abort();
      throw;
    }
  }

  void look_after_others(double seconds) {
    check();
    if (const std::string trouble = transport_->trouble(); !trouble.empty()) lose(trouble);
    if (count_waiting(seconds) < kRankPatience * timeout_) return;
    transport_->abort();
    throw RankError(
        fmt::format("Rank {} ({}) has waited for {:g} s ({:g} times train.rank_timeout), {}, for what the "
                    "GPUs compute together: one of them hangs, or what connects them.",
                    rank(), where(rank()), waited_, kRankPatience,
                    step_ > 0 ? fmt::format("after step {}", step_) : "before the first step"),
        "nvidia-smi and the kernel's log (Xid) may say more. The same command with --resume auto goes on "
        "from the last checkpoint.");
  }

  // Of a wait, what it has been looked at: where looks are far apart, this process was stopped, or its
  // machine, and the other ranks may have been with it.
  double count_waiting(double seconds) {
    constexpr double kMostALook = 1;
    if (seconds < looked_at_) waited_ = looked_at_ = 0;  // another wait
    waited_ += std::min(seconds - looked_at_, kMostALook);
    looked_at_ = seconds;
    return waited_;
  }

  std::shared_ptr<Communicator> host_;  // outlives what may wait
  std::unique_ptr<DeviceTransport> transport_;
  double timeout_ = kRankTimeout;
  std::int64_t step_ = 0;
  double waited_ = 0;     // in the wait that was looked at last,
  double looked_at_ = 0;  // so many seconds behind its beginning
};

}  // namespace

std::shared_ptr<Communicator> make_device_communicator(std::shared_ptr<Communicator> host,
                                                       std::unique_ptr<DeviceTransport> transport) {
  return std::make_shared<DeviceCommunicator>(std::move(host), std::move(transport));
}

}  // namespace fathom
