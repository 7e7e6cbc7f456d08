#pragma once

#include "src/autograd/tape.h"
#include "src/ops/product.h"

namespace fathom::ops {

/// y = x W^T. x [N, in], W [out, in] -> [N, out]; or W [E, out, in], each for the next N/E rows of x.
Tensor linear(Context& c, const Tensor& x, const Weight& weight);
/// base + x W^T: the end of a residual branch, in the product. base [N, out], w as in linear().
Tensor linear_add(Context& c, const Tensor& base, const Tensor& x, const Weight& weight);

/// a + b, of one shape.
Tensor add(Context& c, const Tensor& a, const Tensor& b);

/// silu(x + bias). x [N, W], bias stat [W].
Tensor bias_silu(Context& c, const Tensor& x, const Tensor& bias);

/// r = x . w (+ bias), one scalar a row in the stat dtype. x [N, D], w stat of D elements, bias stat of
/// one or undefined -> [N].
Tensor row_score(Context& c, const Tensor& x, const Tensor& w, const Tensor& bias = {});

}  // namespace fathom::ops
