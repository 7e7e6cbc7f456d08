// How many tokens a calibration reads: a routed layer sees a share of them, and an expert a share of those.
#pragma once

#include <cstdint>
#include <span>

#include "src/model/transformer.h"

namespace fathom {

struct CalibrationGoal {
  std::int64_t layer = 32768;  // tokens that each routed layer is to keep
  std::int64_t expert = 4096;  // that each expert is to take
  std::int64_t most = 0;       // tokens in all
};

/// As many whole sequences, in tokens, as reach the goal where the model goes on to choose as it does on
/// `tokens`, which are sequences of `seq`; at least these, at most `goal.most`.
std::int64_t calibration_tokens_needed(Context& c, const Transformer& model, const SelectionRule& rule,
                                       std::span<const std::int32_t> tokens, std::int64_t seq,
                                       const CalibrationGoal& goal);

}  // namespace fathom
