#include "src/ops/product.h"

#include "kernels/error.h"

namespace fathom::ops {

void product(Context& c, View y, ConstView x, const Weight& w, const LinearShape& s, const Tensor& base) {
  if (w.observer() != nullptr) (*w.observer())(x, s);
  if (!w.is_packed()) {
    if (base.defined()) return c.backend().linear_add_forward(y, base, x, w.tensor(), s);
    return c.backend().linear_forward(y, x, w.tensor(), s);
  }
  if (c.tape() != nullptr) throw InternalError("[product] a weight of few bits has no gradient to record");
  c.backend().linear_packed_forward(y, x, w.packed().view(), s);
  if (base.defined()) c.backend().add(y, y, base);
}

}  // namespace fathom::ops
