// What passes of a model computed, over all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "infer/expert_counts.h"
#include "kernels/decoder.h"
#include "src/model/transformer.h"

namespace fathom {

struct PassCounts {
  std::int64_t rows = 0;                  // of all passes,
  std::vector<std::int64_t> routed_rows;  // and of them, by routed layer, those that it kept
  ExpertCounts experts;

  PassCounts() = default;
  explicit PassCounts(const Transformer& model) : routed_rows(model.routed_layers().size()), experts(model) {}

  void add(const ForwardResult& result, std::int64_t of_rows) {
    rows += of_rows;
    for (std::size_t i = 0; i < result.routing.size(); ++i)
      routed_rows[i] += result.routing[i].indices.size();
    experts.add(result);
  }
  /// A row of a step that the backend did as a whole.
  void add(const DecoderResult& row) {
    ++rows;
    for (std::size_t i = 0; i < row.kept.size(); ++i) routed_rows[i] += row.kept[i];
  }
};

}  // namespace fathom
