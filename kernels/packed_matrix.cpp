#include "kernels/packed_matrix.h"

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

namespace {

void check(std::size_t packed, std::size_t codes, const PackedFormat& f) {
  if (f.bits != 4 && f.bits != 8)
    throw InternalError(fmt::format("[packed matrix] codes of {} bits", f.bits));
  if (static_cast<std::int64_t>(codes) != f.columns || static_cast<std::int64_t>(packed) != f.code_bytes()) {
    throw InternalError(
        fmt::format("[packed matrix] a row of {} columns is {} codes in {} bytes", f.columns, codes, packed));
  }
}

}  // namespace

void check_packed_operand(const char* op, const PackedFormat& f, std::int64_t columns) {
  const auto fail = [op](const char* what, std::int64_t given, std::int64_t expected) {
    throw InternalError(fmt::format("[{}] {}: got {}, expected {}", op, what, given, expected));
  };
  if (columns < 1) fail("in", columns, 1);
  if (f.bits != 4 && f.bits != 8) fail("bits", f.bits, 4);
  if (f.columns != columns) fail("columns of w", f.columns, columns);
  if (f.group < 1 || f.columns % f.group != 0) fail("group", f.group, f.columns);
}

void pack_codes(std::span<std::uint8_t> packed, std::span<const std::int8_t> codes, const PackedFormat& f) {
  check(packed.size(), codes.size(), f);
  for (std::uint8_t& byte : packed) byte = 0;
  for (std::size_t i = 0; i < codes.size(); ++i) {
    const auto code = static_cast<std::uint8_t>(codes[i]);
    if (f.bits == 8) {
      packed[i] = code;
      continue;
    }
    if (codes[i] < -8 || codes[i] > 7)
      throw InternalError(fmt::format("[packed matrix] {} has not 4 bits", codes[i]));
    packed[i / 2] = static_cast<std::uint8_t>(packed[i / 2] | (code & 15U) << (i % 2 * 4));
  }
}

void unpack_codes(std::span<std::int8_t> codes, std::span<const std::uint8_t> packed, const PackedFormat& f) {
  check(packed.size(), codes.size(), f);
  for (std::size_t i = 0; i < codes.size(); ++i) {
    const int byte = packed[f.bits == 8 ? i : i / 2];
    const int low = f.bits == 8 ? byte : byte >> (i % 2 * 4) & 15;
    const int half = 1 << (f.bits - 1);
    codes[i] = static_cast<std::int8_t>((low ^ half) - half);
  }
}

}  // namespace fathom
