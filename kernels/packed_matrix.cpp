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
