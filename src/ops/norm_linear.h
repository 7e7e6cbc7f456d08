// A norm and the product that reads it, as one op: of the norm's input and output the backward keeps the
// output alone. The product's gradient reads it, and the norm's finds in it what it needs of the input
// (rms_norm_backward_from_output), so neither are two [N, D] kept for every layer nor one made again.
#pragma once

#include <utility>

#include "src/autograd/tape.h"
#include "src/ops/product.h"

namespace fathom::ops {

/// rms_norm(x) W^T. x [N, D], norm stat [D], w [out, D] -> [N, out].
Tensor rms_norm_linear(Context& c, const Tensor& x, const Tensor& norm, const Weight& w, double eps);

/// h = x + a, and rms_norm(h) W^T. Returns {h, product}.
std::pair<Tensor, Tensor> add_rms_norm_linear(Context& c, const Tensor& x, const Tensor& a,
                                              const Tensor& norm, const Weight& w, double eps);

}  // namespace fathom::ops
