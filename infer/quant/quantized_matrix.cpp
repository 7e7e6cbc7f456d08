#include "infer/quant/quantized_matrix.h"

#include <cmath>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

void check_quantized_format(std::int64_t rows, std::int64_t columns, int bits, std::int64_t group) {
  if (rows < 1 || columns < 1)
    throw InternalError(fmt::format("[quantized_matrix] a matrix of {} x {}", rows, columns));
  if (bits != 4 && bits != 8)
    throw UserError(fmt::format("Weights of {} bits are not supported.", bits), "Choose 4 or 8.");
  if (group < 1 || columns % group != 0)
    throw UserError(
        fmt::format("Groups of {} columns do not divide a matrix of {} x {}.", group, rows, columns),
        "Choose a divisor of the number of columns, or one scale a row.");
}

void check(const QuantizedMatrix& q) {
  check_quantized_format(q.rows, q.columns, q.bits, q.group);
  const auto codes = static_cast<std::int64_t>(q.codes.size());
  const auto scales = static_cast<std::int64_t>(q.scales.size());
  if (codes != q.rows * q.columns || scales != q.rows * q.groups())
    throw InternalError(fmt::format("[quantized_matrix] {} codes and {} scales for {} x {} in groups of {}",
                                    codes, scales, q.rows, q.columns, q.group));
  const int least = -(1 << (q.bits - 1)), most = -least - 1;
  for (std::int64_t i = 0; i < codes; ++i) {
    const std::int8_t code = q.codes[static_cast<std::size_t>(i)];
    if (code < least || code > most)
      throw InternalError(
          fmt::format("[quantized_matrix] the code at row {}, column {} is {}, outside {}..{}", i / q.columns,
                      i % q.columns, code, least, most));
  }
  for (std::int64_t i = 0; i < scales; ++i) {
    const float scale = q.scales[static_cast<std::size_t>(i)];
    if (!std::isfinite(scale))
      throw InternalError(fmt::format("[quantized_matrix] the scale at row {}, group {} is {}",
                                      i / q.groups(), i % q.groups(), scale));
  }
}

template <typename T>
std::vector<T> dequantize(const QuantizedMatrix& q) {
  check(q);
  std::vector<T> w(q.codes.size());
  // Groups lie one behind the other, across rows too.
  const auto group = static_cast<std::size_t>(q.group);
  for (std::size_t g = 0; g < q.scales.size(); ++g) {
    const T scale = q.scales[g];
    for (std::size_t i = g * group; i < (g + 1) * group; ++i) w[i] = scale * static_cast<T>(q.codes[i]);
  }
  return w;
}

template std::vector<float> dequantize<float>(const QuantizedMatrix& q);
template std::vector<double> dequantize<double>(const QuantizedMatrix& q);

}  // namespace fathom
