#include "kernels/code_operands.h"

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

namespace {

[[noreturn]] void fail(const char* op, const char* what, std::int64_t given, std::int64_t expected) {
  throw InternalError(fmt::format("[{}] {}: got {}, expected {}", op, what, given, expected));
}

}  // namespace

void check_codes_product(const char* op, const PackedFormat& x, const PackedFormat& w, const LinearShape& s) {
  constexpr std::int64_t kMostColumns = (1 << 16) - 1;
  if (s.batch < 1) fail(op, "batch", s.batch, 1);
  check_packed_operand(op, w, s.in);
  check_packed_operand(op, x, s.in);
  if (x.bits != 8 || x.groups() != 1) fail(op, "bits of x", x.bits, 8);
  if (s.in > kMostColumns) fail(op, "in", s.in, kMostColumns);
}

void check_row_quantization(const char* op, const RowQuantization& s) {
  if (s.bits != 4 && s.bits != 8) fail(op, "bits", s.bits, 8);
  if (s.columns < 1) fail(op, "columns", s.columns, 1);
  if (!(s.clip > 0 && s.clip <= 1)) fail(op, "clip", static_cast<std::int64_t>(s.clip), 1);
}

}  // namespace fathom
