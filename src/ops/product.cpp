#include "src/ops/product.h"

#include "kernels/error.h"

namespace fathom::ops {

namespace {

RowQuantization quantization_of(const Weight& w, const LinearShape& s) {
  return {s.batch * s.rows, s.in, w.input().bits, w.input().clip, s.x_row()};
}

CodedRows room_for(Context& c, const RowQuantization& q) {
  return {c.empty({q.rows, q.format().row_bytes()}, DType::U8), c.empty({q.rows}, DType::F32), q.format()};
}

}  // namespace

CodedRows coded_rows(Context& c, CodeSource from, const Weight& w, const LinearShape& s) {
  if (!w.is_packed() || w.input().bits == 16 || w.observer() != nullptr || c.tape() != nullptr) return {};
  const RowQuantization q = quantization_of(w, s);
  if (const Hadamard& h = w.input().hadamard; h.defined()) {
    from.hadamard = h.shape(q.rows, s.in / h.width());
    from.matrix = h.matrix();
  }
  CodedRows rows = room_for(c, q);
  return c.backend().make_codes(rows.codes, rows.scales, from, q) ? rows : CodedRows{};
}

void product(Context& c, View y, const CodedRows& x, const Weight& w, const LinearShape& s,
             const Tensor& base) {
  if (base.defined()) {
    c.backend().linear_codes_add_forward(y, base, x.view(), w.packed().view(), s);
  } else {
    c.backend().linear_codes_forward(y, x.view(), w.packed().view(), s);
  }
}

void product(Context& c, View y, ConstView x, const Weight& w, const LinearShape& shape, const Tensor& base) {
  LinearShape s = shape;
  const InputTransform& input = w.input();
  if (c.tape() != nullptr && (w.is_packed() || input.hadamard.defined()))
    throw InternalError("[product] a weight of few bits, or a transform, has no gradient to record");
  Tensor turned;
  if (input.hadamard.defined()) {
    if (const CodedRows rows = coded_rows(c, {.x = x}, w, s); rows.defined())
      return product(c, y, rows, w, s, base);
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
    const RowQuantization q = quantization_of(w, s);
    const CodedRows rows = room_for(c, q);
    c.backend().quantize_rows(rows.codes, rows.scales, x, q);
    return product(c, y, rows, w, s, base);
  }
  c.backend().linear_packed_forward(y, x, w.packed().view(), s);
  if (base.defined()) c.backend().add(y, y, base);
}

}  // namespace fathom::ops
