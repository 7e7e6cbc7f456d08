// The mean of a layer's keys, element by element of each key/value head, over the calibration: what they lose
// before they become codes of few bits (kernels/cache_codes.h).
#pragma once

#include <cstdint>
#include <vector>

#include "src/model/transformer.h"

namespace fathom {

/// Sums in double, in the order of the rows.
class KeyMeans {
 public:
  explicit KeyMeans(const ModelConfig& m);

  /// The keys of rows [rows, (H+2G)d].
  void add(Context& c, const Tensor& qkv);
  std::int64_t rows() const { return rows_; }
  /// [G, d]; zeros where there was no row.
  std::vector<float> means() const;

 private:
  std::size_t first_, row_;  // elements of a row: before the keys, and all
  std::vector<double> sums_;
  std::int64_t rows_ = 0;
};

}  // namespace fathom
