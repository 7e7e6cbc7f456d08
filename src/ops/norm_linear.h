// A norm and the product that reads it, as one op: the norm's output is not kept for the backward, which
// makes it again from the norm's input (one read and one write of [N, D], against keeping [N, D] of every
// layer).
#pragma once

#include <utility>

#include "src/autograd/tape.h"

namespace fathom::ops {

/// rms_norm(x) W^T. x [N, D], norm stat [D], w [out, D] -> [N, out].
Tensor rms_norm_linear(Context& c, const Tensor& x, const Tensor& norm, const Tensor& w, double eps);

/// h = x + a, and rms_norm(h) W^T. Returns {h, product}.
std::pair<Tensor, Tensor> add_rms_norm_linear(Context& c, const Tensor& x, const Tensor& a,
                                              const Tensor& norm, const Tensor& w, double eps);

}  // namespace fathom::ops
