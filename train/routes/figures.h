// What the routes of a text add up to, a row a layer; for the terminal, the page and JSON.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "train/routes/routes.h"

namespace fathom::routes {

struct RouterFigures {
  std::int64_t layer = 0;
  std::int64_t kept = 0;                  // tokens that the block computed
  double share = 0;                       // of all tokens
  double above = 0;                       // share of tokens whose router says yes: sigma(r) > threshold
  std::optional<double> predicted_above;  // the same of the predictor
  double mean = 0, min = 0, max = 0;      // of r
};

struct ExpertFigures {
  std::int64_t layer = 0;
  std::int64_t reached = 0;           // tokens that the block computed, of which all shares here are
  std::vector<std::int64_t> load;     // tokens of each expert
  double experts_a_token = 0;         // mean
  double without_expert = 0;          // share of tokens that no expert computed
  double noop_affinity = 0;           // mean of a token's affinity for all no-ops together
  double noop_first = 0;              // share of tokens whose largest affinity is a no-op's
  std::optional<double> dropped;      // token choice: share of the choices of experts that found no room
  std::optional<double> noop_chosen;  // token choice: share of all choices that are no-ops
};

/// `threshold` is on sigma(logit).
RouterFigures figures_of(const RoutedTokens& layer, double threshold);
ExpertFigures figures_of(const ExpertTokens& layer);

}  // namespace fathom::routes
