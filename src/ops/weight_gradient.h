#pragma once

#include "src/autograd/tape.h"

namespace fathom::ops {

/// dw = dy^T x into the gradient of w, added to what is there: the first product of a step overwrites
/// instead, which saves zeroing the gradient and reading it back. Does nothing when w wants no gradient.
void add_weight_gradient(Context& c, Tape& t, const Tensor& w, const Tensor& dy, ConstView x,
                         const LinearShape& s);

}  // namespace fathom::ops
