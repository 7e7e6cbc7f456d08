#include "src/ops/weight_gradient.h"

namespace fathom::ops {

void add_weight_gradient(Context& c, Tape& t, const Tensor& w, const Tensor& dy, ConstView x,
                         const LinearShape& s) {
  if (!w.requires_grad()) return;
  const Tape::Sum sum = t.begin_or_sum(w);
  if (sum.empty) {
    c.backend().linear_backward_weight(sum.tensor, dy, x, s);
  } else {
    c.backend().linear_backward_weight_accumulate(sum.tensor, dy, x, s);
  }
}

}  // namespace fathom::ops
