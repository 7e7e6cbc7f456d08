#include "train/ranks.h"

#include <algorithm>
#include <bit>
#include <utility>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/core/splitmix64.h"
#include "train/signals.h"

namespace fathom {

namespace {

// Of this many steps at least: fewer may be an accident.
constexpr std::int64_t kStepsToTell = 5;

// A number of 50 bits, which a double holds.
double fingerprint(std::int64_t step, double state) {
  const std::uint64_t mixed = mix64(std::bit_cast<std::uint64_t>(state) + static_cast<std::uint64_t>(step));
  return static_cast<double>(mixed >> 14);
}

// The mean of all but one.
double mean_of_others(const std::vector<double>& all, std::size_t but) {
  double sum = 0;
  for (std::size_t i = 0; i < all.size(); ++i) sum += i == but ? 0 : all[i];
  return sum / static_cast<double>(all.size() - 1);
}

}  // namespace

Config share_of(const Config& config, int ranks) {
  if (ranks == 1) return config;
  Config share = config;
  const std::int64_t sequences = config.train.batch_tokens / config.train.seq_len;
  if (sequences % ranks != 0) {
    throw UsageError(
        fmt::format(
            "A step has {} sequences (train.batch_tokens / train.seq_len), which {} ranks cannot share "
            "equally.",
            sequences, ranks),
        "Give another train.batch_tokens, or start another number of ranks.");
  }
  const std::int64_t own = sequences / ranks;
  share.train.batch_tokens = own * config.train.seq_len;
  share.train.micro_batch = std::min(config.micro_batch_sequences(), own);
  if (own % share.train.micro_batch != 0) {
    throw UsageError(
        fmt::format("Each of {} ranks has {} sequences of a step, which train.micro_batch = {} does "
                    "not divide.",
                    ranks, own, share.train.micro_batch),
        "Give another train.micro_batch, or start another number of ranks.");
  }
  return share;
}

std::optional<int> slow_rank(const std::vector<double>& seconds) {
  if (seconds.size() < 2) return std::nullopt;
  const auto slowest = static_cast<std::size_t>(
      std::distance(seconds.begin(), std::max_element(seconds.begin(), seconds.end())));
  if (seconds[slowest] <= kSlow * mean_of_others(seconds, slowest)) return std::nullopt;
  return static_cast<int>(slowest);
}

Ranks::Ranks(std::shared_ptr<Communicator> communicator)
    : comm_(std::move(communicator)), seconds_(static_cast<std::size_t>(comm_->size())) {}

bool Ranks::stop_requested() {
  const int mine = fathom::stop_signal();
  signal_ = alone() ? mine : static_cast<int>(max_over(*comm_, mine));
  return signal_ != 0;
}

bool Ranks::stop_requested_before(std::int64_t step, double state) {
  if (alone()) return stop_requested();
  constexpr std::size_t kBeforeSeconds = 3;
  const double print = fingerprint(step, state);
  std::vector<double> said(kBeforeSeconds + seconds_.size());
  said[0] = fathom::stop_signal();
  said[1] = print;
  said[2] = -print;
  said[kBeforeSeconds + static_cast<std::size_t>(rank())] = work_;
  comm_->all_reduce_host(said, Communicator::Reduce::Max);
  if (said[1] != -said[2])
    throw InternalError(fmt::format("[ranks] before step {} not all ranks have the same losses", step + 1));
  comm_->set_progress(step);
  for (std::size_t r = 0; r < seconds_.size(); ++r) seconds_[r] += said[kBeforeSeconds + r];
  ++steps_;
  signal_ = static_cast<int>(said[0]);
  return signal_ != 0;
}

std::optional<std::string> Ranks::slow_rank_since() {
  if (steps_ < kStepsToTell) return std::nullopt;
  std::vector<double> means = std::exchange(seconds_, std::vector<double>(seconds_.size()));
  for (double& s : means) s /= static_cast<double>(steps_);
  steps_ = 0;
  const std::optional<int> slow = slow_rank(means);
  if (!slow) return std::nullopt;
  const auto at = static_cast<std::size_t>(*slow);
  return fmt::format("rank {} ({}): {:.3g} s of its own work a step, the others {:.3g} s", *slow,
                     comm_->where(*slow), means[at], mean_of_others(means, at));
}

}  // namespace fathom
