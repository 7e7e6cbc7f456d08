#include "src/ops/norm_linear.h"

#include "src/ops/check.h"
#include "src/ops/weight_gradient.h"

namespace fathom::ops {

namespace {

// What both ops keep: the norm's output, and the shapes.
struct Saved {
  Tensor normed;
  Tensor rstd;
  Tensor norm;
  Weight w;
  NormShape norm_shape;
  LinearShape linear_shape;
};

// Of a weight whose rows become codes with the norm, in one pass where the backend has one; undefined where
// it has none. sum: x + addend, where there is an addend.
Tensor product_of_codes(Context& c, const char* op, const Saved& s, const Tensor& x, const Tensor& addend,
                        View sum) {
  const CodedRows rows =
      coded_rows(c, {.x = x, .norm = s.norm, .norm_eps = s.norm_shape.eps, .addend = addend, .sum = sum}, s.w,
                 s.linear_shape);
  if (!rows.defined()) return {};
  Tensor y = c.empty({s.linear_shape.rows, s.linear_shape.out});
  product(c, y, rows, s.w, s.linear_shape);
  c.check(op, "", y);
  return y;
}

Saved check(Context& c, const char* op, const Tensor& x, const Tensor& norm, const Weight& w, double eps) {
  const LinearShape s = linear_shape(c, op, "x", x, w);
  if (s.batch != 1) fail(c, op, "w", w.tensor(), Shape{-1, -1});
  expect_shape(c, op, "norm", norm, {s.in});
  return {{}, {}, norm, w, {s.rows, s.in, eps}, s};
}

Tensor product_of(Context& c, const char* op, const Saved& s) {
  Tensor y = c.empty({s.linear_shape.rows, s.linear_shape.out});
  product(c, y, s.normed, s.w, s.linear_shape);
  c.check(op, "", y);
  return y;
}

// The gradient of the norm's input; those of both weights are added on the way. dh: what else reaches the
// input, or undefined.
Tensor backward(Context& c, Tape& t, const Tensor& dh, const Tensor& dy, const Saved& s) {
  add_weight_gradient(c, t, s.w.tensor(), dy, s.normed, s.linear_shape);
  const Tensor dnormed = c.empty(s.normed.shape());
  c.backend().linear_backward_input(dnormed, dy, s.w.tensor(), s.linear_shape);
  Tensor dx = c.empty(s.normed.shape());
  c.backend().rms_norm_backward_from_output(dx, t.sum_into(s.norm), dh, dnormed, s.normed, s.norm, s.rstd,
                                            s.norm_shape);
  return dx;
}

}  // namespace

Tensor rms_norm_linear(Context& c, const Tensor& x, const Tensor& norm, const Weight& w, double eps) {
  Saved s = check(c, "rms_norm_linear", x, norm, w, eps);
  if (Tensor y = product_of_codes(c, "rms_norm_linear", s, x, {}, {}); y.defined()) return y;
  s.rstd = c.empty_stat({x.dim(0)});
  s.normed = c.empty(x.shape());
  c.backend().rms_norm_forward(s.normed, s.rstd, x, norm, s.norm_shape);
  Tensor y = product_of(c, "rms_norm_linear", s);
  if (wants_record(c, {x, norm, w.tensor()})) {
    c.tape()->record("rms_norm_linear", {y}, [&c, s, x = x.without_data()](Tape& t) {
      // Where x is also the base of a residual branch, that gradient is here already: added on the way.
      const Tensor dy = t.gradient();
      t.give(x, backward(c, t, t.take(x), dy, s));
    });
  }
  return y;
}

std::pair<Tensor, Tensor> add_rms_norm_linear(Context& c, const Tensor& x, const Tensor& a,
                                              const Tensor& norm, const Weight& w, double eps) {
  Saved s = check(c, "add_rms_norm_linear", x, norm, w, eps);
  expect_shape(c, "add_rms_norm_linear", "a", a, x.shape());
  Tensor h = c.empty(x.shape());
  if (Tensor y = product_of_codes(c, "add_rms_norm_linear", s, x, a, h); y.defined()) return {h, y};
  s.rstd = c.empty_stat({x.dim(0)});
  s.normed = c.empty(x.shape());
  c.backend().add_rms_norm_forward(h, s.normed, s.rstd, x, a, norm, s.norm_shape);
  Tensor y = product_of(c, "add_rms_norm_linear", s);
  if (wants_record(c, {x, a, norm, w.tensor()})) {
    c.tape()->record("add_rms_norm_linear", {h, y},
                     [&c, s, x = x.without_data(), a = a.without_data()](Tape& t) {
                       const Tensor dh = t.gradient(0);
                       const Tensor dy = t.gradient(1);
                       // Where nothing read the product, h is a plain sum.
                       const Tensor dx = dy.defined() ? backward(c, t, dh, dy, s) : dh;
                       t.give(x, dx);
                       t.give(a, dx);
                     });
  }
  return {h, y};
}

}  // namespace fathom::ops
