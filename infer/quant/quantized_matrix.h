// A matrix of few bits as quantizers give it and as the products of few bits read it: integer codes, and a
// scale for each row or for each group of a row's columns. A code is a whole byte here, whatever its bits;
// how codes are packed is the file's and the kernels' own.
#pragma once

#include <cstdint>
#include <vector>

namespace fathom {

/// w[r][c] is about scales[r * groups() + c / group] * codes[r * columns + c].
struct QuantizedMatrix {
  std::int64_t rows = 0, columns = 0;
  int bits = 4;                    // 4 or 8
  std::int64_t group = 0;          // columns that share a scale: divides columns; columns itself: one a row
  std::vector<std::int8_t> codes;  // [rows][columns], -2^(bits-1) .. 2^(bits-1)-1
  std::vector<float> scales;       // [rows][columns / group]

  std::int64_t groups() const { return columns / group; }
};

/// UserError: bits other than 4 and 8, or groups that do not divide the columns. InternalError: no rows or no
/// columns.
void check_quantized_format(std::int64_t rows, std::int64_t columns, int bits, std::int64_t group);

/// All of check_quantized_format(), and an InternalError for codes or scales of another number than the
/// sizes say, codes that the bits cannot hold and scales that are not finite.
void check(const QuantizedMatrix& q);

/// [rows][columns], T float or double; after check().
template <typename T>
std::vector<T> dequantize(const QuantizedMatrix& q);

extern template std::vector<float> dequantize<float>(const QuantizedMatrix& q);
extern template std::vector<double> dequantize<double>(const QuantizedMatrix& q);

}  // namespace fathom
