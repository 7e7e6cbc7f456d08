#include "src/ops/product.h"

#include "kernels/error.h"

namespace fathom::ops {

void product(Context& c, View y, ConstView x, const Weight& w, const LinearShape& s) {
  if (w.observer() != nullptr) (*w.observer())(x, s);
  if (!w.is_packed()) return c.backend().linear_forward(y, x, w.tensor(), s);
  if (c.tape() != nullptr) throw InternalError("[product] a weight of few bits has no gradient to record");
  c.backend().linear_packed_forward(y, x, w.packed().view(), s);
}

}  // namespace fathom::ops
