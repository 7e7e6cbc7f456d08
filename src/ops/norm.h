#pragma once

#include <utility>

#include "src/autograd/tape.h"

namespace fathom::ops {

/// RMSNorm (Zhang & Sennrich 2019): x / sqrt(mean(x^2) + eps) * w. x [N, D], w stat [D].
Tensor rms_norm(Context& c, const Tensor& x, const Tensor& w, double eps);

/// h = x + a, and rms_norm(h): the residual and the norm after it, in one pass. Returns {h, norm}.
std::pair<Tensor, Tensor> add_rms_norm(Context& c, const Tensor& x, const Tensor& a, const Tensor& w,
                                       double eps);

}  // namespace fathom::ops
