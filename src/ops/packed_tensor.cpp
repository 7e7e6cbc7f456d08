#include "src/ops/packed_tensor.h"

#include <cstring>

#include <fmt/format.h>

#include "kernels/error.h"

namespace fathom {

PackedTensor upload_packed(Context& c, const Shape& shape, const PackedFormat& format,
                           std::span<const std::byte> codes, std::span<const float> scales) {
  PackedTensor t{shape, format, {}, {}};
  const std::int64_t rows = shape.rank() < 2 || format.columns != shape[-1] ? -1 : t.rows();
  if (rows < 0 || std::ssize(codes) != rows * format.code_bytes() ||
      std::ssize(scales) != rows * format.groups()) {
    throw InternalError(
        fmt::format("[packed tensor] {} of {} bits in groups of {}: {} bytes of codes, {} scales",
                    shape.str(), format.bits, format.group, codes.size(), scales.size()));
  }
  const auto from = static_cast<std::size_t>(format.code_bytes());
  const auto to = static_cast<std::size_t>(format.row_bytes());
  std::vector<std::byte> padded(static_cast<std::size_t>(rows) * to);
  for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r)
    std::memcpy(padded.data() + r * to, codes.data() + r * from, from);
  t.codes = c.empty({rows, format.row_bytes()}, DType::U8, MemoryTag::Parameters);
  t.scales = c.empty({rows, format.groups()}, DType::F32, MemoryTag::Parameters);
  c.backend().copy_from_host(t.codes.data(), padded.data(), padded.size());
  c.backend().copy_from_host(t.scales.data(), scales.data(), scales.size_bytes());
  return t;
}

std::vector<std::byte> download_codes(Backend& backend, const PackedTensor& t) {
  const auto to = static_cast<std::size_t>(t.format.code_bytes());
  const auto from = static_cast<std::size_t>(t.format.row_bytes()), rows = static_cast<std::size_t>(t.rows());
  std::vector<std::byte> padded(t.codes.bytes()), codes(rows * to);
  backend.copy_to_host(padded.data(), t.codes.data(), padded.size());
  for (std::size_t r = 0; r < rows; ++r) std::memcpy(codes.data() + r * to, padded.data() + r * from, to);
  return codes;
}

std::vector<float> dequantized(Backend& backend, const PackedTensor& t) {
  const std::vector<std::byte> bytes = download_codes(backend, t);
  const std::vector<float> scales = to_host<float>(backend, t.scales);
  const auto columns = static_cast<std::size_t>(t.format.columns),
             group = static_cast<std::size_t>(t.format.group);
  const auto each = static_cast<std::size_t>(t.format.code_bytes());
  std::vector<float> values;
  std::vector<std::int8_t> codes(columns);
  std::vector<std::uint8_t> row(each);
  for (std::size_t r = 0; r < static_cast<std::size_t>(t.rows()); ++r) {
    std::memcpy(row.data(), bytes.data() + r * each, each);
    unpack_codes(codes, row, t.format);
    const float* of_row = scales.data() + r * (columns / group);
    for (std::size_t k = 0; k < columns; ++k)
      values.push_back(of_row[k / group] * static_cast<float>(codes[k]));
  }
  return values;
}

}  // namespace fathom
