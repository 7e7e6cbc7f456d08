// What communicators of several processes have in common: the ranks' names, and the watch over them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "train/comm/communicator.h"
#include "train/comm/watch.h"

namespace fathom {

class WatchedCommunicator : public Communicator {
 public:
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::string where(int rank) const override { return where_.at(static_cast<std::size_t>(rank)); }
  int local_rank() const override { return local_rank_; }
  int local_size() const override { return local_size_; }
  void finish() override {}  // the host's memory: everything has been done

  std::vector<std::string> gather(const std::string& mine) override;
  void barrier() override;

  void set_timeout(double seconds) override { watch_->set_timeout(seconds); }
  void set_progress(std::int64_t step) override { watch_->set_progress(step); }
  bool fail(const std::string& why) noexcept override;

  void enter() override;
  void leave() noexcept override;
  /// A little later than the loss: where all ranks fail of the same reason, the first is not to hide it from
  /// those who are just coming.
  void check() override;
  [[noreturn]] void lose(const std::string& what) override;

 protected:
  WatchedCommunicator() = default;
  void set_rank(int rank, int size) { rank_ = rank, size_ = size; }
  /// Once the collectives work.
  void begin_watch();
  /// For the other ranks' eyes this one ends in order, unless something failed before. Returns whether it did
  /// not.
  bool end_watch();

  /// While it lives, the rank is in a collective.
  class InCollective {
   public:
    explicit InCollective(WatchedCommunicator& c) : c_(c) { c_.enter(); }
    ~InCollective() { c_.leave(); }
    InCollective(const InCollective&) = delete;
    InCollective& operator=(const InCollective&) = delete;

   private:
    WatchedCommunicator& c_;
  };

  /// Every rank's bytes, one behind the other, of these sizes; the caller's are in place.
  virtual void gather_bytes(std::byte* bytes, std::span<const std::int64_t> sizes) = 0;

 private:
  int rank_ = 0, size_ = 1;
  int local_rank_ = 0, local_size_ = 0;
  std::vector<std::string> hosts_, where_;
  std::unique_ptr<Watch> watch_;
  std::chrono::steady_clock::time_point lost_;
  bool failed_ = false;
};

}  // namespace fathom
