// One optimizer step: forward and backward over its micro-batches, the norms, the update; and finding the
// culprit of a number that is not finite.
//
// On a device that can, the forward, the backward and the norms of all micro-batches are captured once, at
// the second step, and launched as one piece of work from then on; the host meanwhile makes the next step's
// batches.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "src/autograd/context.h"
#include "src/model/transformer.h"
#include "train/evaluate.h"
#include "train/metrics/record.h"
#include "train/optimizer.h"

namespace fathom {

/// What a step measured, before its update.
struct StepOutcome {
  double loss = 0;              // cross-entropy, nats a token
  double aux = 0;               // BCE of the routers, mean over layers
  double predictor = 0;         // BCE of the predictors
  double balance = 0;           // of token choice
  double z = 0;                 // likewise
  double expert_aux = 0;        // of expert choice: BCE of its routers, mean over layers
  double expert_predictor = 0;  // of its predictors
  AdamW::Norms norms;
  std::vector<RouterSummary> routing;         // of the last micro-batch, by routed layer
  std::vector<ExpertStats> experts;           // likewise, by layer with experts
  std::vector<RouterSummary> expert_routing;  // likewise, where experts choose and a causal rule is trained
  bool finite() const;
};

class StepRunner {
 public:
  /// The `count` sequences from number `first` on of the training stream.
  using Source = std::function<HostBatch(std::int64_t first, std::int64_t count)>;

  /// All arguments must outlive it.
  StepRunner(Context& c, Transformer& model, const Config& config, Source source);

  /// Gradients of 0-based `step`, whose sequences are number `first_sequence` and on of the source. Empty
  /// when a stop was asked for between its micro-batches.
  std::optional<StepOutcome> gradients(std::int64_t step, std::int64_t first_sequence);

  /// Runs the step's forward and backward again with every op checked, and says where the first number that
  /// is not finite came from: "swiglu of layer 3 (12 of its values)". Leaves the gradients unusable.
  std::string trace(std::int64_t step, std::int64_t first_sequence);

 private:
  struct Prefetched {
    std::int64_t first = -1;
    std::vector<HostBatch> batches;
  };

  void load(std::int64_t first_sequence);
  std::vector<HostBatch> host_batches(std::int64_t first_sequence) const;
  /// Launches the whole step. False: a stop was asked for.
  bool launch(std::int64_t step);
  bool record_step(std::int64_t step);
  /// Waits for the step. DeviceError: a fault in it, which is named where it was launched as one.
  StepOutcome read(std::int64_t step) const;
  std::vector<double> read_report(std::int64_t step) const;

  Context& context_;
  Transformer& model_;
  const Config& config_;
  Source source_;
  std::vector<Batch> batches_;  // by micro-batch; the captured work reads them
  Prefetched next_;
  // What the step leaves on the device: the losses of each micro-batch, the summaries of the routed layers
  // and of the experts, the gradients' sums of squares.
  Tensor report_;
  Allocator memory_;  // of all that lives within a step
  std::unique_ptr<CapturedWork> captured_;
  int launched_ = 0;
  bool as_one_ = false;  // the step at hand was launched as captured work
};

}  // namespace fathom
