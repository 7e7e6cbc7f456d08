#include "app/quantizer.h"

#include "infer/quant/round_to_nearest.h"

namespace fathom::app {

QuantizedMatrix quantize(const MatrixToQuantize& matrix) {
  const PackedFormat& f = matrix.format;
  return round_to_nearest(matrix.values, matrix.rows, f.columns,
                          {.bits = f.bits, .group = f.group, .clip = Clip::LeastSquares});
}

}  // namespace fathom::app
