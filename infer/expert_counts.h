// Which rows experts took, over passes.
#pragma once

#include <cstdint>
#include <vector>

#include "src/model/transformer.h"

namespace fathom {

/// By layer of experts: the rows that it computed, and of them, by expert, those that it took.
struct ExpertCounts {
  std::vector<std::int64_t> layer_rows;
  std::vector<std::vector<std::int64_t>> rows;

  ExpertCounts() = default;
  explicit ExpertCounts(const Transformer& model)
      : layer_rows(model.expert_layers().size()),
        rows(layer_rows.size(),
             std::vector<std::int64_t>(static_cast<std::size_t>(model.routing().experts.count))) {}

  void add(const ForwardResult& result) {
    for (const ExpertLayer& e : result.experts) {
      const auto layer = static_cast<std::size_t>(e.layer);
      layer_rows[layer] += e.dispatch.shape.rows;
      std::vector<std::int64_t>& taken = rows[layer];
      for (std::size_t i = 0; i < taken.size() && i < e.dispatch.taken.size(); ++i)
        taken[i] += e.dispatch.taken[i];
    }
  }
  /// By layer and expert, the share of the layer's rows.
  std::vector<std::vector<double>> shares() const;
};

}  // namespace fathom
