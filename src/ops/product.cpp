#include "src/ops/product.h"

#include "kernels/error.h"

namespace fathom::ops {

namespace {

// The rows as codes, and their product.
void product_of_codes(Context& c, View y, ConstView x, const Weight& w, const LinearShape& s) {
  const RowQuantization q{s.batch * s.rows, s.in, w.input().bits, w.input().clip, s.x_row()};
  const Tensor codes = c.empty({q.rows, q.format().row_bytes()}, DType::U8);
  const Tensor scales = c.empty({q.rows}, DType::F32);
  c.backend().quantize_rows(codes, scales, x, q);
  c.backend().linear_codes_forward(y, {codes, scales, q.format()}, w.packed().view(), s);
}

}  // namespace

void product(Context& c, View y, ConstView x, const Weight& w, const LinearShape& shape, const Tensor& base) {
  LinearShape s = shape;
  const InputTransform& input = w.input();
  if (c.tape() != nullptr && (w.is_packed() || input.hadamard.defined()))
    throw InternalError("[product] a weight of few bits, or a transform, has no gradient to record");
  Tensor turned;
  if (input.hadamard.defined()) {
    const std::int64_t rows = s.batch * s.rows;
    turned = c.empty({rows, s.in}, x.dtype);
    input.hadamard.apply(c, turned, x, rows, s.in / input.hadamard.width(), s.x_row(), s.in);
    x = turned;
    s.x_stride = 0;
  }
  if (w.observer() != nullptr) (*w.observer())(x, s);
  if (!w.is_packed()) {
    if (input.bits < 16) throw InternalError("[product] rows of few bits go with weights of few bits");
    if (base.defined()) return c.backend().linear_add_forward(y, base, x, w.tensor(), s);
    return c.backend().linear_forward(y, x, w.tensor(), s);
  }
  if (input.bits < 16) {
    product_of_codes(c, y, x, w, s);
  } else {
    c.backend().linear_packed_forward(y, x, w.packed().view(), s);
  }
  if (base.defined()) c.backend().add(y, y, base);
}

}  // namespace fathom::ops
