// The ranks of a training as the trainer sees them: what each computes of a step, whether they go on, and
// which of them is slow.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "src/config/config.h"
#include "train/comm/communicator.h"

namespace fathom {

/// What one of `ranks` computes of a step of `config`: an equal share of the sequences, in micro-batches that
/// are no larger than the config's. UsageError: the sequences of a step, or the micro-batch, do not divide
/// so.
Config share_of(const Config& config, int ranks);

/// A rank whose own work takes this many times as long as the others' is slow.
inline constexpr double kSlow = 1.5;
/// The slow one, if there is one; seconds of own work, by rank.
std::optional<int> slow_rank(const std::vector<double>& seconds);

class Ranks {
 public:
  Ranks() : Ranks(make_lone_communicator()) {}
  explicit Ranks(std::shared_ptr<Communicator> communicator);

  Communicator& comm() const { return *comm_; }
  int rank() const { return comm_->rank(); }
  int size() const { return comm_->size(); }
  bool alone() const { return comm_->alone(); }
  /// Whether this rank writes and speaks.
  bool leads() const { return rank() == 0; }

  /// Whether any rank was asked to stop (train/signals.h). A collective: all ranks ask at the same moments,
  /// and get the same answer.
  bool stop_requested();
  /// The signal behind a stop that was agreed upon, or 0.
  int stop_signal() const { return signal_; }

  /// The same, before step `step` (from 0), and says what of the step this rank has computed from `state`, a
  /// number that is to be the same on all ranks. InternalError: it is not.
  bool stop_requested_before(std::int64_t step, double state);
  /// Seconds of forward and backward of the step, this rank's own.
  void note_work(double seconds) { work_ = seconds; }
  /// "rank 1 (host, process 4711): 0.80 s a step, the others 0.40 s" of the steps since the last call, if one
  /// was slow; after enough of them to tell.
  std::optional<std::string> slow_rank_since();

 private:
  std::shared_ptr<Communicator> comm_;
  int signal_ = 0;
  double work_ = 0;
  std::vector<double> seconds_;  // by rank, of the steps since the last slow_rank_since()
  std::int64_t steps_ = 0;       // these
};

}  // namespace fathom
