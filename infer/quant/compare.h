// A model before and after its weights became few bits, on the same tokens: the loss, and what is decided
// otherwise.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "src/model/transformer.h"

namespace fathom {

/// Of a routed block, or of all experts of a layer together, a decision being one expert's of one token.
struct ComparedDecisions {
  std::int64_t layer = 0;
  bool of_experts = false;
  double share_before = 0, share_after = 0;  // of the model's tokens (times experts), that are taken
  double flipped = 0;                        // of the same, that are decided otherwise
};

struct ModelComparison {
  std::int64_t tokens = 0;
  double loss_before = 0, loss_after = 0;    // nats a token, chosen by the rule
  std::vector<ComparedDecisions> decisions;  // layers ascending, a block's before its experts'
};

struct ComparedRules {
  SelectionRule before, after;
};

/// `tokens` are sequences of `seq` and one token more, which only the last is asked for; what is left over is
/// not looked at. InternalError: not one sequence, or models of other shapes.
ModelComparison compare_models(Context& c, const Transformer& before, const Transformer& after,
                               const ComparedRules& rules, std::span<const std::int32_t> tokens,
                               std::int64_t seq);

}  // namespace fathom
