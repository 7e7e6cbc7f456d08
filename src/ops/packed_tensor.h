// Matrices of few bits on a device (kernels/packed_matrix.h has how they lie there).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/packed_matrix.h"
#include "src/autograd/context.h"

namespace fathom {

/// One matrix [out, in], or those of experts [E, out, in]. Cheap to copy: copies share the storage.
struct PackedTensor {
  Shape shape;
  PackedFormat format;  // of each row, of `in` columns
  Tensor codes;         // uint8 [rows, row_bytes()]
  Tensor scales;        // fp32 [rows, groups()]

  bool defined() const { return codes.defined(); }
  std::int64_t rows() const { return shape.size() / format.columns; }
  PackedView view() const { return {codes, scales, format}; }
};

/// Puts a matrix on the device. `codes`: code_bytes() of each row, without a gap, as files have them;
/// `scales` [rows, groups()]. InternalError: they are not as many as the shape and the format say.
PackedTensor upload_packed(Context& c, const Shape& shape, const PackedFormat& format,
                           std::span<const std::byte> codes, std::span<const float> scales);
/// The codes of a matrix, as upload_packed takes them.
std::vector<std::byte> download_codes(Backend& backend, const PackedTensor& t);
/// scale * code of every element.
std::vector<float> dequantized(Backend& backend, const PackedTensor& t);

}  // namespace fathom
