// A Mixture-of-Depths transformer in plain loops over doubles, one token after the other, that shares no code
// with the engine: what the tests of known_bugs_test.cpp hold it against. It knows nothing of gathering: a
// token of a routed block attends to those earlier tokens of its sequence that the block kept.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "src/config/config.h"

namespace fathom::known_bugs {

using Values = std::vector<double>;
using Parameters = std::map<std::string, Values>;

struct Sequences {
  std::int64_t batch = 0;
  std::int64_t seq = 0;
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> targets;
  std::vector<std::int32_t> documents;  // empty: no mask
};

/// How the reference's routed blocks choose.
struct Choice {
  enum class By { TopK, Router, Predictor } by = By::TopK;
  double threshold = 0.5;  // on sigmoid of the logit
};

struct RoutedRows {
  Values scores;           // [N]
  Values predicted;        // [N]; empty without a predictor
  std::vector<bool> kept;  // [N]
  /// Kept rows, ascending.
  std::vector<std::int32_t> rows() const;
};

struct ReferenceResult {
  std::vector<Values> streams;  // [depth + 1][N * D]: the embedding, then after each block
  Values logits;                // [N * V]
  std::map<std::int64_t, RoutedRows> routed;
};

class ReferenceModel {
 public:
  ReferenceModel(const ModelConfig& model, const RoutingConfig& routing, Parameters parameters)
      : m_(model), r_(routing), p_(std::move(parameters)) {}

  ReferenceResult run(const Sequences& in, const Choice& choice) const;
  /// Mean cross-entropy of the targets, nats.
  double cross_entropy(const Sequences& in, const Choice& choice) const;
  /// Mean over rows, then over routed layers, of the predictor's binary cross-entropy against membership.
  double predictor_loss(const ReferenceResult& result) const;

  Parameters& parameters() { return p_; }

 private:
  const Values& weight(std::int64_t layer, const std::string& name) const;
  void choose(RoutedRows& rows, const Sequences& in, const Choice& choice) const;
  /// f = a + m of the kept rows of one block; zero elsewhere.
  Values block(std::int64_t layer, const Values& x, const Sequences& in, const std::vector<bool>& kept) const;

  ModelConfig m_;
  RoutingConfig r_;
  Parameters p_;
};

double sigmoid(double x);

}  // namespace fathom::known_bugs
