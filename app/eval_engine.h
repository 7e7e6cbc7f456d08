// Evaluation through the inference engine: what serving computes, on the text that training evaluates on.
#pragma once

#include <cstdint>
#include <vector>

#include "infer/engine.h"
#include "train/data_loader.h"

namespace fathom::app {

struct EngineLoss {
  double loss = 0;  // nats a token
  std::int64_t tokens = 0;
  std::vector<double> routed_fraction;  // by routed layer: the share of the tokens that it computed
  EngineStats stats;
};

/// Over the first `tokens` tokens of the store, in whole sequences (0: all), as train/evaluate.h counts them.
EngineLoss engine_loss(Context& c, const Transformer& model, const EngineOptions& options,
                       const DataLoader& data, std::int64_t tokens);

}  // namespace fathom::app
