#include "src/ops/mlp.h"

#include <cstddef>
#include <utility>

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
      c.backend().swiglu_backward(dgate_up, dh, gate_up, rows, hidden);
      t.give(gate_up, std::move(dgate_up));
    });
  }
  return h;
}

namespace {

// The second half of each row of [rows, 2 hidden], from the first row's to the end of the last.
ConstView second_halves(const Tensor& pairs, std::int64_t hidden) {
  if (pairs.size() == 0) return pairs;
  const auto bytes = static_cast<std::size_t>(hidden) * size_of(pairs.dtype());
  return {static_cast<const std::byte*>(pairs.data()) + bytes, pairs.size() - hidden, pairs.dtype()};
}

// Of weights of few bits: nobody will look for `up` in the output.
Tensor swiglu_onto_codes(Context& c, const char* op, const Tensor& base, const Tensor& gate_up,
                         const Weight& weight, LinearShape s) {
  Tensor y = c.empty({s.batch * s.rows, s.out});
  s.x_stride = 0;
  if (const CodedRows rows = coded_rows(c, {.x = gate_up, .swiglu = true}, weight, s); rows.defined()) {
    product(c, y, rows, weight, s, base);
  } else {
    const Tensor h = c.empty({s.batch * s.rows, s.in});
    c.backend().swiglu_forward(h, gate_up, s.batch * s.rows, s.in);
    product(c, y, h, weight, s, base);
  }
  c.check(op, "", y);
  return y;
}

// By value: who gives the only handle away lets it be written over.
// NOLINTNEXTLINE(performance-unnecessary-value-param)
Tensor swiglu_onto(Context& c, const char* op, const Tensor& base, Tensor gate_up, const Weight& weight) {
  expect_matrix(c, op, "gate_up", gate_up);
  const LinearShape s = linear_shape(c, op, "gate_up", gate_up, weight, 2);
  const std::int64_t rows = gate_up.dim(0), hidden = s.in;
  if (base.defined()) expect_shape(c, op, "base", base, {rows, s.out});
  if (weight.is_packed()) return swiglu_onto_codes(c, op, base, gate_up, weight, s);
  Tensor gate_h = gate_up.owners() == 1 ? gate_up.detach() : c.empty(gate_up.shape());
  c.backend().swiglu_forward_beside_gate(gate_h, gate_up, rows, hidden);
  Tensor y = c.empty({rows, s.out});
  product(c, y, second_halves(gate_h, hidden), weight, s, base);
  c.check(op, "", y);
  const Tensor& w = weight.tensor();
  if (wants_record(c, {gate_up, w, base})) {
    c.tape()->record(op, {y},
                     [&c, base = base.without_data(), input = gate_up.without_data(),
                      gate_h = std::move(gate_h), w, rows, hidden, s](Tape& t) {
                       const Tensor dy = t.gradient();
                       t.give(base, dy);
                       // The weight's gradient first: so dh is read as soon as it is written, partly from a
                       // cache.
                       add_weight_gradient(c, t, w, dy, second_halves(gate_h, hidden), s);
                       const Tensor dh = c.empty({rows, hidden});
                       c.backend().linear_backward_input(dh, dy, w, {s.rows, s.in, s.out, s.batch});
                       // What was kept has been read for the last time.
                       Tensor dgate_up = gate_h.owners() == 1 ? gate_h : c.empty(gate_h.shape());
                       c.backend().swiglu_backward_from_output(dgate_up, dh, gate_h, rows, hidden);
                       t.give(input, std::move(dgate_up));
                     });
  }
  return y;
}

}  // namespace

Tensor swiglu_linear(Context& c, Tensor gate_up, const Weight& weight) {
  return swiglu_onto(c, "swiglu_linear", {}, std::move(gate_up), weight);
}

Tensor swiglu_linear_add(Context& c, const Tensor& base, Tensor gate_up, const Weight& weight) {
  return swiglu_onto(c, "swiglu_linear_add", base, std::move(gate_up), weight);
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
