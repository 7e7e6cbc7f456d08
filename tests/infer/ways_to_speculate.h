// Ways to speculate, over texts of some hundred tokens.
#pragma once

#include <cstdint>
#include <string>

#include "infer/speculate/speculation.h"

namespace fathom::testing_support {

struct Way {
  std::string name;
  SpeculationOptions options;
};

/// With entries that are retrieved, and a window, that are shorter than the texts.
inline SpeculationOptions way_of(SpeculationOptions::Method method, SpeculationOptions::Draft draft,
                                 std::int64_t proposals, std::int64_t between = 1) {
  SpeculationOptions o;
  o.method = method;
  o.draft = draft;
  o.retrieval = {.budget = 48, .chunk = 4};
  o.window = {.sinks = 4, .recent = 24};
  o.proposals = proposals;
  o.proposals_between = between;
  return o;
}

/// Whether self-skip is a draft of the model: it has routed blocks and others.
inline bool skips(const Transformer& model) {
  const auto routed = static_cast<std::int64_t>(model.routed_layers().size());
  return routed > 0 && routed < model.config().depth;
}

}  // namespace fathom::testing_support
