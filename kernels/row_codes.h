// Rows that become codes of few bits, and what they go through before.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"
#include "kernels/packed_matrix.h"

namespace fathom {

/// Hadamard transforms of parts of rows (kernels/hadamard.h): a row has `blocks` blocks, one after the other,
/// and a block is `inner` vectors of factor * power elements side by side, element i of one at i * inner +
/// its number. Each vector becomes (H_factor (x) H_power) x / sqrt(factor * power).
struct HadamardShape {
  std::int64_t rows = 0;
  std::int64_t blocks = 1;
  std::int64_t factor = 1;  // K, at most 512
  std::int64_t power = 1;   // 2^m
  std::int64_t inner = 1;
  /// Elements from a row to the next, where rows are parts of wider ones; 0: width(). Views end with their
  /// last row.
  std::int64_t x_stride = 0, y_stride = 0;

  std::int64_t block() const { return factor * power * inner; }
  std::int64_t width() const { return blocks * block(); }
  std::int64_t x_row() const { return x_stride > 0 ? x_stride : width(); }
  std::int64_t y_row() const { return y_stride > 0 ? y_stride : width(); }
  std::int64_t x_size() const { return rows > 0 ? (rows - 1) * x_row() + width() : 0; }
  std::int64_t y_size() const { return rows > 0 ? (rows - 1) * y_row() + width() : 0; }
};

/// Rows that become codes of few bits, each with a scale of its own.
struct RowQuantization {
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  int bits = 8;             // 4 or 8
  float clip = 1;           // of the largest magnitude, above 0 and up to 1
  std::int64_t stride = 0;  // elements from a row of x to the next; 0: `columns`

  constexpr std::int64_t x_row() const { return stride > 0 ? stride : columns; }
  std::int64_t x_size() const { return rows > 0 ? (rows - 1) * x_row() + columns : 0; }
  /// How the codes lie, of 4 bits as well: one a byte, rows as those of a packed matrix of 8 bits.
  PackedFormat format() const { return {8, columns, columns}; }
};

/// What rows go through before they become codes: a norm or a SwiGLU, or neither, and then a Hadamard
/// transform or none. Each leaves numbers of x's dtype.
struct CodeSource {
  /// [rows, columns], a row every RowQuantization::x_row() elements. With a norm without gaps; of a SwiGLU
  /// gate_up [rows, 2 * columns], likewise.
  ConstView x;
  bool swiglu = false;  // rows are silu(gate) * up
  ConstView norm = {};  // RMSNorm's weight, stat [columns]; null: no norm
  double norm_eps = 0;
  ConstView addend = {};        // with a norm, which then is of sum = x + addend; null: none
  View sum = {};                // as x; null where there is no addend
  ConstView matrix = {};        // of the transform, as hadamard_forward has it
  HadamardShape hadamard = {};  // rows 0: none; dense, its width is `columns`

  bool has_hadamard() const { return hadamard.rows > 0; }
};

}  // namespace fathom
