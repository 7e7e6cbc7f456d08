#include "src/ops/mlp.h"

#include "src/ops/check.h"

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
      c.backend().swiglu_backward(dgate_up, dh, gate_up, rows, hidden);
      t.give(gate_up, std::move(dgate_up));
    });
  }
  return h;
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
