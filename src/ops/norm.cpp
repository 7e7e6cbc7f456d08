#include "src/ops/norm.h"

#include "src/ops/check.h"

namespace fathom::ops {

Tensor rms_norm(Context& c, const Tensor& x, const Tensor& w, double eps) {
  const NormShape s{expect_rows(c, "rms_norm", "x", x, w.size()), w.size(), eps};
  Tensor y = c.empty(x.shape());
  const Tensor rstd = c.empty_stat({s.rows});
  c.backend().rms_norm_forward(y, rstd, x, w, s);
  c.check("rms_norm", "", y);
  if (wants_record(c, {x, w})) {
    c.tape()->record("rms_norm", {y}, [&c, x, w, rstd, s](Tape& t) {
      const Tensor dy = t.gradient();
      Tensor dx = c.empty(x.shape());
      c.backend().rms_norm_backward(dx, t.sum_into(w), dy, x, w, rstd, s);
      t.give(x, std::move(dx));
    });
  }
  return y;
}

std::pair<Tensor, Tensor> add_rms_norm(Context& c, const Tensor& x, const Tensor& a, const Tensor& w,
                                       double eps) {
  const NormShape s{expect_rows(c, "add_rms_norm", "x", x, w.size()), w.size(), eps};
  expect_shape(c, "add_rms_norm", "a", a, x.shape());
  Tensor h = c.empty(x.shape());
  Tensor y = c.empty(x.shape());
  const Tensor rstd = c.empty_stat({s.rows});
  c.backend().add_rms_norm_forward(h, y, rstd, x, a, w, s);
  c.check("add_rms_norm", "", y);
  if (wants_record(c, {x, a, w})) {
    // The closure reads h, which is its own output: detached, so that the tape does not keep itself alive.
    c.tape()->record("add_rms_norm", {h, y},
                     [&c, x = x.without_data(), a = a.without_data(), h = h.detach(), w, rstd, s](Tape& t) {
                       const Tensor dh = t.gradient(0);
                       const Tensor dy = t.gradient_or_zeros(1, x.shape(), x.dtype());
                       Tensor dx = c.empty(x.shape());
                       c.backend().add_rms_norm_backward(dx, t.sum_into(w), dh, dy, h, w, rstd, s);
                       t.give(x, dx);
                       t.give(a, dx);
                     });
  }
  return {h, y};
}

}  // namespace fathom::ops
