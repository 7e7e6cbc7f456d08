// What makes few bits of a matrix, for the commands that do.
#pragma once

#include "infer/quant/quantize_model.h"

namespace fathom::app {

/// Rounds to the nearest code of scales that lose the least.
QuantizedMatrix quantize(const MatrixToQuantize& matrix);

}  // namespace fathom::app
