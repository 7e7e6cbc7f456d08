// The plainest quantizer: the largest weight of a group decides its scale.
#pragma once

#include <algorithm>
#include <cmath>

#include "infer/quant/quantize_model.h"

namespace fathom::quant_test {

inline QuantizedMatrix round_to_nearest(const MatrixToQuantize& m) {
  const PackedFormat& f = m.format;
  QuantizedMatrix q{m.rows, f.columns, f.bits, f.group, {}, {}};
  const float most = static_cast<float>((1 << (f.bits - 1)) - 1);
  const auto group = static_cast<std::size_t>(f.group);
  for (std::size_t first = 0; first < m.values.size(); first += group) {
    float largest = 0;
    for (const float w : m.values.subspan(first, group)) largest = std::max(largest, std::abs(w));
    const float scale = largest / most;
    q.scales.push_back(scale);
    for (const float w : m.values.subspan(first, group)) {
      const float code = scale > 0 && std::isfinite(scale) ? std::round(w / scale) : 0;
      q.codes.push_back(static_cast<std::int8_t>(std::clamp(code, -most - 1, most)));
    }
  }
  return q;
}

}  // namespace fathom::quant_test
