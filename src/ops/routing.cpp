#include "src/ops/routing.h"

#include <cmath>

#include "src/ops/check.h"

namespace fathom::ops {

Tensor top_k_rows(Context& c, const Tensor& scores, std::int64_t batch, std::int64_t seq, std::int64_t keep) {
  expect_shape(c, "top_k_rows", "scores", scores, {batch * seq});
  Tensor indices = c.empty({batch * keep}, DType::I32);
  c.backend().top_k_rows(indices, scores, batch, seq, keep);
  return indices;
}

Tensor rows_above(Context& c, const Tensor& scores, double threshold, std::int64_t batch, std::int64_t seq) {
  expect_shape(c, "rows_above", "scores", scores, {batch * seq});
  const Tensor room = c.empty({batch * seq}, DType::I32);
  const Tensor offsets = c.empty({batch + 1}, DType::I32);
  const std::int64_t kept = c.backend().select_above(room, offsets, scores, threshold, batch, seq);
  return room.rows(0, kept);
}

float fp32_below(double x) {
  const auto nearest = static_cast<float>(x);
  return static_cast<double>(nearest) > x ? std::nextafter(nearest, -INFINITY) : nearest;
}

Tensor gather_rows(Context& c, const Tensor& x, const Tensor& indices) {
  expect_matrix(c, "gather_rows", "x", x);
  const GatherShape s{x.dim(0), indices.size(), x.dim(1)};
  Tensor out = c.empty({s.rows, s.width});
  c.backend().gather_rows_forward(out, x, indices, s);
  if (wants_record(c, {x})) {
    c.tape()->record("gather_rows", {out}, [&c, x = x.without_data(), indices, s](Tape& t) {
      const Tensor dout = t.gradient();
      c.backend().gather_rows_backward_accumulate(t.sum_into(x), dout, indices, s);
    });
  }
  return out;
}

Tensor gather_int32(Context& c, const Tensor& x, const Tensor& indices) {
  Tensor out = c.empty({indices.size()}, DType::I32);
  c.backend().gather_int32(out, x, indices);
  return out;
}

Tensor gather_stat(Context& c, const Tensor& x, const Tensor& indices) {
  Tensor out = c.empty_stat({indices.size()});
  c.backend().gather_rows_forward(out, x, indices, {x.size(), indices.size(), 1});
  return out;
}

Tensor gated_scatter(Context& c, const Tensor& x, const Tensor& f, const Tensor& r, const Tensor& indices,
                     GateKind gate) {
  expect_matrix(c, "gated_scatter", "x", x);
  const GatherShape s{x.dim(0), indices.size(), x.dim(1)};
  expect_shape(c, "gated_scatter", "f", f, {s.rows, s.width});
  expect_shape(c, "gated_scatter", "r", r, {s.source_rows});
  Tensor y = c.empty(x.shape());
  c.backend().gated_scatter_forward(y, x, f, r, indices, gate, s);
  c.check("gated_scatter", "", y);
  if (wants_record(c, {x, f, r})) {
    c.tape()->record("gated_scatter", {y}, [&c, x = x.without_data(), f, r, indices, gate, s](Tape& t) {
      Tensor dy = t.gradient();
      Tensor df = c.empty(f.shape());
      c.backend().gated_scatter_backward(df, t.sum_into(r), dy, f, r, indices, gate, s);
      t.give(f, std::move(df));
      t.give(x, std::move(dy));  // the residual passes through untouched
    });
  }
  return y;
}

}  // namespace fathom::ops
