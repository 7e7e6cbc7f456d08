#include "src/ops/norm_linear.h"

#include "src/ops/check.h"
#include "src/ops/weight_gradient.h"

namespace fathom::ops {

namespace {

// What both ops keep: the norm's input, and the shapes.
struct Saved {
  Tensor h;
  Tensor rstd;
  Tensor norm;
  Tensor w;
  NormShape norm_shape;
  LinearShape linear_shape;
};

Saved check(Context& c, const char* op, const Tensor& x, const Tensor& norm, const Tensor& w, double eps) {
  expect_matrix(c, op, "w", w);
  const std::int64_t width = w.dim(1);
  const std::int64_t rows = expect_rows(c, op, "x", x, width);
  expect_shape(c, op, "norm", norm, {width});
  return {{}, c.empty_stat({rows}), norm, w, {rows, width, eps}, {rows, width, w.dim(0)}};
}

Tensor product(Context& c, const char* op, const Tensor& normed, const Saved& s) {
  Tensor y = c.empty({s.linear_shape.rows, s.linear_shape.out});
  c.backend().linear_forward(y, normed, s.w, s.linear_shape);
  c.check(op, "", y);
  return y;
}

// The gradient of the norm's output; the weight's gradient is added on the way.
Tensor backward_to_norm(Context& c, Tape& t, const Tensor& dy, const Saved& s) {
  Tensor normed = c.empty(s.h.shape());
  if (s.w.requires_grad()) {
    c.backend().rms_norm_forward(normed, s.rstd, s.h, s.norm,
                                 s.norm_shape);  // the same numbers as the first time
    add_weight_gradient(c, t, s.w, dy, normed, s.linear_shape);
  }
  c.backend().linear_backward_input(normed, dy, s.w,
                                    s.linear_shape);  // its old values were read for the last time
  return normed;
}

}  // namespace

Tensor rms_norm_linear(Context& c, const Tensor& x, const Tensor& norm, const Tensor& w, double eps) {
  Saved s = check(c, "rms_norm_linear", x, norm, w, eps);
  Tensor y;
  {
    const Tensor normed = c.empty(x.shape());
    c.backend().rms_norm_forward(normed, s.rstd, x, norm, s.norm_shape);
    y = product(c, "rms_norm_linear", normed, s);
  }
  if (wants_record(c, {x, norm, w})) {
    s.h = x;
    c.tape()->record("rms_norm_linear", {y}, [&c, s](Tape& t) {
      const Tensor dnormed = backward_to_norm(c, t, t.gradient(), s);
      Tensor dx = c.empty(s.h.shape());
      c.backend().rms_norm_backward(dx, t.sum_into(s.norm), dnormed, s.h, s.norm, s.rstd, s.norm_shape);
      t.give(s.h, std::move(dx));
    });
  }
  return y;
}

std::pair<Tensor, Tensor> add_rms_norm_linear(Context& c, const Tensor& x, const Tensor& a,
                                              const Tensor& norm, const Tensor& w, double eps) {
  Saved s = check(c, "add_rms_norm_linear", x, norm, w, eps);
  expect_shape(c, "add_rms_norm_linear", "a", a, x.shape());
  Tensor h = c.empty(x.shape());
  Tensor y;
  {
    const Tensor normed = c.empty(x.shape());
    c.backend().add_rms_norm_forward(h, normed, s.rstd, x, a, norm, s.norm_shape);
    y = product(c, "add_rms_norm_linear", normed, s);
  }
  if (wants_record(c, {x, a, norm, w})) {
    s.h = h.detach();  // an output: detached, so that the tape does not keep itself alive
    c.tape()->record("add_rms_norm_linear", {h, y},
                     [&c, s, x = x.without_data(), a = a.without_data()](Tape& t) {
                       const Tensor dh = t.gradient(0);
                       const Tensor dy = t.gradient(1);
                       if (!dy.defined()) {  // nothing read the product: h is a plain sum
                         t.give(x, dh);
                         t.give(a, dh);
                         return;
                       }
                       const Tensor dnormed = backward_to_norm(c, t, dy, s);
                       Tensor dx = c.empty(s.h.shape());
                       c.backend().add_rms_norm_backward(dx, t.sum_into(s.norm), dh, dnormed, s.h, s.norm,
                                                         s.rstd, s.norm_shape);
                       t.give(x, dx);
                       t.give(a, dx);
                     });
  }
  return {h, y};
}

}  // namespace fathom::ops
