// One optimizer step: forward and backward over its micro-batches, the norms, the update; and finding the
// culprit of a number that is not finite.
//
// The device judges by itself whether the update is made (Backend::judge_step): nobody waits inside a step.
// On a device that can, all of it is captured once, at the second step, and launched as one piece of work
// from then on. Then a step may be launched before the report of the one before it was read. Where the device
// does not make an update it makes none of those behind it either, until a step is launched with none before
// it: so what was launched ahead of a step that turns out not to count has changed nothing, and is launched
// again.
//
// One of several ranks computes its share of the sequences. Every loss is a mean over sequences, or over rows
// of which each sequence has as many, so the mean of the ranks' means is that of one rank with all of them; a
// gradient likewise. Only after a step's last micro-batch do the ranks exchange anything: gradients, losses
// and squares before the device judges the step, which it does alike on all of them; weights behind the
// update.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/error.h"
#include "src/autograd/context.h"
#include "src/model/transformer.h"
#include "train/evaluate.h"
#include "train/metrics/record.h"
#include "train/optimizer.h"
#include "train/ranks.h"

namespace fathom {

/// What a step measured, before its update, and whether that was made.
struct StepOutcome {
  bool applied = false;
  double loss = 0;              // cross-entropy, nats a token
  double aux = 0;               // BCE of the routers, mean over layers
  double predictor = 0;         // BCE of the predictors
  double balance = 0;           // of token choice
  double z = 0;                 // likewise
  double expert_aux = 0;        // of expert choice: BCE of its routers, mean over layers
  double expert_predictor = 0;  // of its predictors
  AdamW::Norms norms;
  // Of the last micro-batch, of all ranks': the mean of shares and means, the least and the largest of
  // others.
  std::vector<RouterSummary> routing;         // by routed layer
  std::vector<ExpertStats> experts;           // by layer with experts
  std::vector<RouterSummary> expert_routing;  // likewise, where experts choose and a causal rule is trained
  bool finite() const;
};

/// What a step goes by.
struct StepStart {
  std::int64_t step = 0;            // 0-based
  std::int64_t first_sequence = 0;  // number of its first one in the source
  double lr = 0;
  /// Of the losses before it. Of a step that is launched behind another only the device knows.
  LossMean mean = {};
};

/// How the answer of StepRunner::trace begins when the culprit is not in what it ran.
inline constexpr const char* kNoSingleOp = "no single op";

class StepRunner {
 public:
  /// The `count` sequences from number `first` on of the training stream.
  using Source = std::function<HostBatch(std::int64_t first, std::int64_t count)>;

  /// All arguments must outlive it. One of several ranks: `config` is its share (share_of), the optimizer has
  /// its shards, and all numbers of sequences are of the whole steps.
  StepRunner(Context& c, Transformer& model, AdamW& optimizer, const Config& config, Source source,
             std::shared_ptr<Ranks> ranks = std::make_shared<Ranks>());
  ~StepRunner();
  StepRunner(const StepRunner&) = delete;
  StepRunner& operator=(const StepRunner&) = delete;

  /// Sets the device to work on a step; read() has what came of it. False: a stop was asked for before it or,
  /// of a rank alone, between its micro-batches, and nothing has changed.
  bool launch(const StepStart& start);
  /// Whether a step may be launched behind one that was not read yet: one, no more.
  bool runs_ahead() const { return captured_ != nullptr; }
  /// Whether `step` was launched and not read yet.
  bool launched(std::int64_t step) const;
  /// Waits for the earliest step that was launched. DeviceError: a fault, which is named where it was
  /// launched as one.
  StepOutcome read();
  /// Waits for what was launched behind a step whose update was not made, and takes it for never launched.
  void forget();

  /// Runs the step's forward and backward again with every op checked, and says where the first number that
  /// is not finite came from: "swiglu of layer 3 (12 of its values)". Leaves the gradients unusable, and what
  /// the optimizer changes as it is. No step may be launched and not read.
  std::string trace(std::int64_t step, std::int64_t first_sequence);

 private:
  struct Prefetched {
    std::int64_t first = -1;
    std::vector<HostBatch> batches;
  };

  struct Flight {
    std::int64_t step = 0;
    bool as_one = false;  // launched as captured work
    std::size_t readback = 0;
  };

  void load(std::int64_t first_sequence);
  void prepare(const StepStart& start);
  std::vector<HostBatch> host_batches(std::int64_t first_sequence) const;
  /// Has the whole step done, captured or op by op. False: a stop was asked for.
  bool run(Flight& flight);
  /// `reduction`: of the gradients, begun as they become final; null: they stay this rank's own.
  bool record_gradients(std::int64_t step, GradientReduction* reduction);
  void exchange_losses();
  void record_update();
  std::vector<double> wait_for(const Flight& flight);
  StepOutcome outcome_of(const std::vector<double>& report) const;
  [[noreturn]] void fail(const DeviceError& e, const Flight& first, std::int64_t last) const;
  StepRule rule() const;
  bool draws_noise() const;
  std::int64_t own_sequences() const { return config_.accumulation() * config_.micro_batch_sequences(); }
  std::int64_t losses() const { return config_.accumulation() * model_.loss_slots(); }
  std::int64_t summaries() const;
  Tensor own_summaries() const;

  Context& context_;
  Transformer& model_;
  AdamW& optimizer_;
  const Config& config_;
  Source source_;
  std::vector<Batch> batches_;  // by micro-batch; the captured work reads them
  Prefetched next_;
  std::shared_ptr<Ranks> ranks_;
  // What the step leaves on the device: the losses of each micro-batch, the gradients' sums of squares,
  // whether the update was made, and of each rank the summaries of the routed layers and of the experts.
  Tensor report_;
  Tensor mean_;       // LossMean
  Tensor streams_;    // of the step's noise, int64 [1]
  Tensor sent_;       // GradientReduction's, where gradients are sent as bf16
  Allocator memory_;  // of all that lives within a step
  std::unique_ptr<CapturedWork> captured_;
  bool warm_ = false;                                 // a step has run op by op
  std::vector<std::unique_ptr<Readback>> readbacks_;  // of reports, used in turn
  std::size_t next_readback_ = 0;
  std::deque<Flight> flights_;  // launched and not read
};

}  // namespace fathom
