// What ops on codes of few bits may be asked for: the same on every backend.
#pragma once

#include "kernels/backend.h"

namespace fathom {

/// InternalError: such operands have no product (Backend::linear_codes_forward), or more columns than 32 bits
/// hold the sum of.
void check_codes_product(const char* op, const PackedFormat& x, const PackedFormat& w, const LinearShape& s);

/// InternalError: rows cannot become such codes (Backend::quantize_rows).
void check_row_quantization(const char* op, const RowQuantization& s);

}  // namespace fathom
