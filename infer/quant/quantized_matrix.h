// A matrix in few bits, as quantizers make it.
#pragma once

#include <cstdint>
#include <vector>

namespace fathom {

/// w[r][c] is about scales[r * (columns / group) + c / group] * codes[r * columns + c].
struct QuantizedMatrix {
  std::int64_t rows = 0, columns = 0;
  int bits = 4;            // 4 or 8
  std::int64_t group = 0;  // columns that share a scale: divides columns; columns itself: one scale a row
  std::vector<std::int8_t> codes;  // [rows][columns], -2^(bits-1) .. 2^(bits-1)-1
  std::vector<float> scales;       // [rows][columns / group]
};

}  // namespace fathom
