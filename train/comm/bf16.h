// bf16 on the host, for sums in fp32.
#pragma once

#include <span>

#include "kernels/dtype.h"

namespace fathom {

/// `to` has as many elements as `from`, which is bf16.
void to_fp32(std::span<float> to, ConstView from);
/// Rounds to the nearest, ties to even; a NaN stays one.
void to_bf16(View to, std::span<const float> from);

}  // namespace fathom
