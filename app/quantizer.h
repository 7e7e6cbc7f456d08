// What makes few bits of a matrix, for the commands that do.
#pragma once

#include "infer/quant/quantize_model.h"

namespace fathom::app {

/// Rounds to the nearest code; the largest weight of a group decides its scale.
QuantizedMatrix quantize(const MatrixToQuantize& matrix);

}  // namespace fathom::app
