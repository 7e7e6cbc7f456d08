#include "app/quantizer.h"

#include <algorithm>
#include <cmath>

namespace fathom::app {

QuantizedMatrix quantize(const MatrixToQuantize& matrix) {
  const PackedFormat& f = matrix.format;
  QuantizedMatrix q{matrix.rows, f.columns, f.bits, f.group, {}, {}};
  q.codes.reserve(matrix.values.size());
  const int most = (1 << (f.bits - 1)) - 1;
  const auto group = static_cast<std::size_t>(f.group);
  for (std::size_t first = 0; first < matrix.values.size(); first += group) {
    const std::span<const float> weights = matrix.values.subspan(first, group);
    float largest = 0;
    bool is_finite = true;
    for (const float w : weights) {
      largest = std::max(largest, std::abs(w));
      is_finite = is_finite && std::isfinite(w);
    }
    const float scale = is_finite ? largest / static_cast<float>(most) : INFINITY;
    q.scales.push_back(scale);
    const bool has_codes = scale > 0 && is_finite;
    for (const float w : weights) {
      const int code = has_codes ? static_cast<int>(std::lround(w / scale)) : 0;
      q.codes.push_back(static_cast<std::int8_t>(std::clamp(code, -most, most)));
    }
  }
  return q;
}

}  // namespace fathom::app
