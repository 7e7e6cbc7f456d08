// Matrices of few bits, as products read them: w[r][c] = scales[r][c / group] * codes[r][c], with codes of
// two's complement, -2^(bits-1) .. 2^(bits-1) - 1.
//
// A row's codes lie one after the other from its lowest bits on: of 4 bits two a byte, the even column in the
// lower half; of 8 bits one a byte. So a little-endian word of 32 bits holds eight (or four) neighbours, and
// a vector of words gives, shifted by n codes, the n-th of each: kernels read codes as they lie, and rows of
// x in that order. Rows begin every row_bytes(), whole cache lines and whole vectors of every instruction
// set; what lies behind a row's last column is zero. Scales are fp32, rows x groups() of them, none behind a
// row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kernels/dtype.h"

namespace fathom {

struct PackedFormat {
  int bits = 4;              // 4 or 8
  std::int64_t columns = 0;  // of a row
  std::int64_t group = 0;    // columns that share a scale: divides `columns`

  std::int64_t groups() const { return columns / group; }
  /// Bytes that a row's codes fill: what a file holds of it.
  std::int64_t code_bytes() const { return (columns * bits + 7) / 8; }
  /// Bytes from a row to the next.
  std::int64_t row_bytes() const { return (code_bytes() + 63) / 64 * 64; }

  bool operator==(const PackedFormat&) const = default;
};

/// The operand of a product, `rows` of one or of several matrices one below the other.
struct PackedView {
  ConstView codes;   // uint8 [rows * row_bytes()]
  ConstView scales;  // fp32 [rows * groups()]
  PackedFormat format;
};

/// InternalError: such a matrix cannot be what an op multiplies rows of so many elements by.
void check_packed_operand(const char* op, const PackedFormat& f, std::int64_t columns);

/// A row's codes, code_bytes() of them, from one a byte (`columns` of them). InternalError: a code that has
/// no place in so many bits.
void pack_codes(std::span<std::uint8_t> packed, std::span<const std::int8_t> codes, const PackedFormat& f);
/// And back.
void unpack_codes(std::span<std::int8_t> codes, std::span<const std::uint8_t> packed, const PackedFormat& f);

}  // namespace fathom
