#include "src/ops/linear.h"

#include "src/ops/check.h"
#include "src/ops/weight_gradient.h"

namespace fathom::ops {

namespace {

// y = x W^T, or base + x W^T.
Tensor product_onto(Context& c, const char* op, const Tensor& base, const Tensor& x, const Weight& weight) {
  const LinearShape s = linear_shape(c, op, "x", x, weight);
  Tensor y = c.empty({s.batch * s.rows, s.out});
  if (base.defined()) expect_shape(c, op, "base", base, y.shape());
  product(c, y, x, weight, s, base);
  c.check(op, "", y);
  const Tensor& w = weight.tensor();
  if (wants_record(c, {x, w, base})) {
    c.tape()->record(op, {y}, [&c, base = base.without_data(), x, w, s](Tape& t) {
      const Tensor dy = t.gradient();
      t.give(base, dy);
      add_weight_gradient(c, t, w, dy, x, s);
      if (!x.requires_grad()) return;
      Tensor dx = c.empty(x.shape());
      c.backend().linear_backward_input(dx, dy, w, s);
      t.give(x, std::move(dx));
    });
  }
  return y;
}

}  // namespace

Tensor linear(Context& c, const Tensor& x, const Weight& weight) {
  return product_onto(c, "linear", {}, x, weight);
}

Tensor linear_add(Context& c, const Tensor& base, const Tensor& x, const Weight& weight) {
  return product_onto(c, "linear_add", base, x, weight);
}

Tensor add(Context& c, const Tensor& a, const Tensor& b) {
  expect_shape(c, "add", "b", b, a.shape());
  Tensor y = c.empty(a.shape(), a.dtype());
  c.backend().add(y, a, b);
  c.check("add", "", y);
  if (wants_record(c, {a, b})) {
    c.tape()->record("add", {y}, [a = a.without_data(), b = b.without_data()](Tape& t) {
      const Tensor dy = t.gradient();
      t.give(a, dy);
      t.give(b, dy);
    });
  }
  return y;
}

Tensor bias_silu(Context& c, const Tensor& x, const Tensor& bias) {
  const std::int64_t width = bias.size();
  const std::int64_t rows = expect_rows(c, "bias_silu", "x", x, width);
  Tensor h = c.empty(x.shape());
  c.backend().bias_silu_forward(h, x, bias, rows, width);
  c.check("bias_silu", "", h);
  if (wants_record(c, {x, bias})) {
    c.tape()->record("bias_silu", {h}, [&c, x, bias, rows, width](Tape& t) {
      const Tensor dh = t.gradient();
      Tensor dx = c.empty(x.shape());
      c.backend().bias_silu_backward(dx, t.sum_into(bias), dh, x, bias, rows, width);
      t.give(x, std::move(dx));
    });
  }
  return h;
}

Tensor row_score(Context& c, const Tensor& x, const Tensor& w, const Tensor& bias) {
  const std::int64_t width = w.size();
  const std::int64_t rows = expect_rows(c, "row_score", "x", x, width);
  if (bias.defined()) expect_shape(c, "row_score", "bias", bias, {1});
  Tensor r = c.empty_stat({rows});
  c.backend().row_score_forward(r, x, w, bias, rows, width);
  c.backend().flop_log.gemm(rows, 1, width);
  c.check("row_score", "", r);
  if (wants_record(c, {x, w, bias})) {
    c.tape()->record("row_score", {r}, [&c, x, w, bias, rows, width](Tape& t) {
      const Tensor dr = t.gradient();
      const Tensor dx = x.requires_grad() ? t.sum_into(x) : Tensor();
      const Tensor dbias = bias.defined() ? t.sum_into(bias) : Tensor();
      c.backend().row_score_backward_accumulate(dx, t.sum_into(w), dbias, dr, x, w, rows, width);
      c.backend().flop_log.gemm(rows, width, dx.defined() ? 2 : 1);
    });
  }
  return r;
}

}  // namespace fathom::ops
