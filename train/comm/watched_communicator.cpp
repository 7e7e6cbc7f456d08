#include "train/comm/watched_communicator.h"

#include <algorithm>
#include <thread>

#include <fmt/format.h>
#include <unistd.h>

#include "train/comm/host.h"
#include "train/comm/rank_error.h"

namespace fathom {

namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

}  // namespace

void WatchedCommunicator::begin_watch() {
  hosts_ = gather(host_name());
  where_ = gather(fmt::format("{}, process {}", host_name(), ::getpid()));
  const std::string& mine = hosts_[static_cast<std::size_t>(rank_)];
  for (int r = 0; r < size_; ++r) {
    if (hosts_[static_cast<std::size_t>(r)] != mine) continue;
    if (r < rank_) ++local_rank_;
    ++local_size_;
  }
  const auto text_of_rank_0 = [this](const std::string& text) { return fathom::text_of_rank_0(*this, text); };
  watch_ = std::make_unique<Watch>(WatchOptions{.rank = rank_,
                                                .hosts = hosts_,
                                                .where = where_,
                                                .timeout = kRankTimeout,
                                                .text_of_rank_0 = text_of_rank_0});
}

bool WatchedCommunicator::end_watch() {
  if (failed_ || !watch_ || watch_->found_loss()) return false;
  watch_.reset();
  return true;
}

std::vector<std::string> WatchedCommunicator::gather(const std::string& mine) {
  std::vector<double> sizes(static_cast<std::size_t>(size_));
  sizes[static_cast<std::size_t>(rank_)] = static_cast<double>(mine.size());
  all_reduce_host(sizes, Reduce::Sum);
  // What others say is no size before it is looked at: they may be of another build.
  constexpr double kMostBytes = 1 << 26;
  for (std::size_t r = 0; r < sizes.size(); ++r) {
    if (!(sizes[r] >= 0 && sizes[r] <= kMostBytes))
      throw RankError(fmt::format("Rank {} says what no rank of this program says.", r),
                      "Start the same build on all hosts.");
  }
  const std::vector<std::int64_t> counts(sizes.begin(), sizes.end());
  std::string all(static_cast<std::size_t>(offset_of(counts, size_)), '\0');
  std::copy(mine.begin(), mine.end(), all.begin() + offset_of(counts, rank_));
  gather_bytes(reinterpret_cast<std::byte*>(all.data()), counts);
  std::vector<std::string> texts;
  for (int r = 0; r < size_; ++r)
    texts.push_back(all.substr(static_cast<std::size_t>(offset_of(counts, r)),
                               static_cast<std::size_t>(counts[static_cast<std::size_t>(r)])));
  return texts;
}

void WatchedCommunicator::barrier() { sum_over(*this, 0); }

bool WatchedCommunicator::fail(const std::string& why) noexcept {
  failed_ = true;
  return watch_ && watch_->fail(why);
}

void WatchedCommunicator::enter() {
  if (!watch_) return;
  watch_->check();
  watch_->enter();
}

void WatchedCommunicator::leave() noexcept {
  if (watch_) watch_->leave();
}

void WatchedCommunicator::check() {
  if (!watch_ || !watch_->found_loss()) return;
  constexpr milliseconds kToCome{200};
  if (lost_ == Clock::time_point{}) lost_ = Clock::now();
  if (Clock::now() - lost_ > kToCome) watch_->check();
}

void WatchedCommunicator::lose(const std::string& what) {
  constexpr milliseconds kToBeFound{1000};
  for (const Clock::time_point end = Clock::now() + kToBeFound; watch_ && Clock::now() < end;) {
    watch_->check();
    std::this_thread::sleep_for(milliseconds(5));
  }
  Communicator::lose(what);
}

}  // namespace fathom
