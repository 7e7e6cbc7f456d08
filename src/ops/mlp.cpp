#include "src/ops/mlp.h"

#include "src/ops/check.h"
#include "src/ops/weight_gradient.h"

namespace fathom::ops {

Tensor swiglu(Context& c, const Tensor& gate_up) {
  expect_matrix(c, "swiglu", "gate_up", gate_up);
  const std::int64_t rows = gate_up.dim(0);
  const std::int64_t hidden = gate_up.dim(1) / 2;
  expect_shape(c, "swiglu", "gate_up", gate_up, {rows, 2 * hidden});
  Tensor h = c.empty({rows, hidden});
  c.backend().swiglu_forward(h, gate_up, rows, hidden);
  c.check("swiglu", "", h);
  if (wants_record(c, {gate_up})) {
    c.tape()->record("swiglu", {h}, [&c, gate_up, rows, hidden](Tape& t) {
      const Tensor dh = t.gradient();
      Tensor dgate_up = c.empty(gate_up.shape());
      c.backend().swiglu_backward(dgate_up, View{}, dh, gate_up, rows, hidden);
      t.give(gate_up, std::move(dgate_up));
    });
  }
  return h;
}

Tensor swiglu_linear(Context& c, const Tensor& gate_up, const Tensor& w) {
  expect_matrix(c, "swiglu_linear", "gate_up", gate_up);
  const std::int64_t rows = gate_up.dim(0), hidden = w.shape()[-1];
  expect_shape(c, "swiglu_linear", "gate_up", gate_up, {rows, 2 * hidden});
  Tensor y;
  LinearShape s;
  {
    const Tensor h = c.empty({rows, hidden});
    s = linear_shape(c, "swiglu_linear", "h", h, w);
    y = c.empty({rows, s.out});
    c.backend().swiglu_forward(h, gate_up, rows, hidden);
    c.backend().linear_forward(y, h, w, s);
  }
  c.check("swiglu_linear", "", y);
  if (wants_record(c, {gate_up, w})) {
    c.tape()->record("swiglu_linear", {y}, [&c, gate_up, w, rows, s](Tape& t) {
      const Tensor dy = t.gradient();
      const Tensor dh = c.empty({rows, s.in});
      const Tensor h = c.empty({rows, s.in});
      Tensor dgate_up = c.empty(gate_up.shape());
      c.backend().linear_backward_input(dh, dy, w, s);
      c.backend().swiglu_backward(dgate_up, h, dh, gate_up, rows, s.in);
      add_weight_gradient(c, t, w, dy, h, s);
      t.give(gate_up, std::move(dgate_up));
    });
  }
  return y;
}

Tensor embedding(Context& c, const Tensor& table, const Tensor& tokens) {
  expect_matrix(c, "embedding", "table", table);
  const std::int64_t rows = tokens.size();
  const std::int64_t width = table.dim(1);
  Tensor out = c.empty({rows, width});
  c.backend().embedding_forward(out, table, tokens, rows, width);
  c.check("embedding", "", out);
  if (wants_record(c, {table})) {
    c.tape()->record("embedding", {out}, [&c, table = table.without_data(), tokens, rows, width](Tape& t) {
      const Tensor dout = t.gradient();
      c.backend().embedding_backward_accumulate(t.sum_into(table), dout, tokens, rows, width);
    });
  }
  return out;
}

}  // namespace fathom::ops
