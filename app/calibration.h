// What `quantize` reads of a token store: tokens to calibrate on, from its start, and others to compare by,
// from its end.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "app/trained_model.h"

namespace fathom::app {

struct CalibrationTokens {
  std::int64_t seq = 0;                // tokens of a sequence
  std::vector<std::int32_t> tokens;    // whole sequences
  std::vector<std::int32_t> held_out;  // whole sequences and one token
  std::int64_t wanted = 0;             // before routed layers and experts asked for more
  std::int64_t most = 0;               // that they may ask for
  std::int64_t in_store = 0;           // all of the store's tokens
  std::string store;                   // identifies its content
};

/// `tokens` 0: 128 sequences of 2048, or what there is. Sequences are as long as those of its training (of a
/// folder: the model's context), 2048 at most.
/// Where routed layers or experts see too few, up to four times as many are read. UserError: a store of
/// another tokenizer, or of too few tokens.
CalibrationTokens read_calibration(const std::string& path, const TrainedModel& model, std::int64_t tokens);

/// How the model is to choose: by its causal rule, where it has one.
SelectionRule serving_rule(const RoutingConfig& routing);

}  // namespace fathom::app
