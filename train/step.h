// One optimizer step: forward and backward over its micro-batches, the norms, the update; and finding the
// culprit of a number that is not finite.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "src/autograd/context.h"
#include "train/data_loader.h"
#include "train/evaluate.h"
#include "train/optimizer.h"

namespace fathom {

/// What a step measured, before its update.
struct StepOutcome {
  double loss = 0;       // cross-entropy, nats a token
  double aux = 0;        // BCE of the routers, mean over layers
  double predictor = 0;  // BCE of the predictors
  AdamW::Norms norms;
  std::vector<RouterSummary> routing;  // of the last micro-batch, by routed layer
  bool finite() const;
};

class StepRunner {
 public:
  StepRunner(Context& c, Transformer& model, const DataLoader& data, const Config& config)
      : context_(c), model_(model), data_(data), config_(config) {}

  /// Gradients of 0-based `step`, whose sequences are number `first_sequence` and on of the shuffled stream.
  /// Empty when a stop was asked for between its micro-batches. `statistics`: fill StepOutcome::routing.
  std::optional<StepOutcome> gradients(std::int64_t step, std::int64_t first_sequence, bool statistics);

  /// Runs the step's forward and backward again with every op checked, and says where the first number that
  /// is not finite came from: "swiglu of layer 3 (12 of its values)". Leaves the gradients unusable.
  std::string trace(std::int64_t step, std::int64_t first_sequence);

 private:
  Context& context_;
  Transformer& model_;
  const DataLoader& data_;
  const Config& config_;
};

}  // namespace fathom
