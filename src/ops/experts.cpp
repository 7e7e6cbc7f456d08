#include "src/ops/experts.h"

#include "src/ops/check.h"
#include "src/ops/weight_gradient.h"

namespace fathom::ops {

Affinity expert_affinity(Context& c, const Tensor& x, const Tensor& w) {
  expect_matrix(c, "expert_affinity", "w", w);
  const LinearShape s = linear_shape(c, "expert_affinity", "x", x, w);
  const Affinity out{c.empty_stat({s.out, s.rows}), c.empty_stat({s.rows})};
  {
    const Tensor logits = c.empty_stat({s.rows, s.out});  // not rounded to the compute dtype
    c.backend().linear_forward(logits, x, w, s);
    c.backend().expert_affinity_forward(out.affinity, out.lse, logits, s.rows, s.out);
  }
  c.check("expert_affinity", "", out.affinity);
  if (wants_record(c, {x, w})) {
    // The closure reads the affinity, which is its own output: detached, so that the tape does not keep
    // itself alive.
    c.tape()->record(
        "expert_affinity", {out.affinity, out.lse}, [&c, x, w, affinity = out.affinity.detach(), s](Tape& t) {
          const Tensor daffinity = t.gradient(0), dlse = t.gradient(1);
          const Tensor dlogits = c.empty({s.rows, s.out});
          c.backend().expert_affinity_backward(dlogits, daffinity, dlse, affinity, s.rows, s.out);
          add_weight_gradient(c, t, w, dlogits, x, s);
          if (!x.requires_grad()) return;
          Tensor dx = c.empty(x.shape());
          c.backend().linear_backward_input(dx, dlogits, w, s);
          t.give(x, std::move(dx));
        });
  }
  return out;
}

Dispatch expert_choice(Context& c, const Tensor& affinity, const ExpertSequences& s) {
  const std::int64_t rows = s.batch * s.seq;
  expect_matrix(c, "expert_choice", "affinity", affinity);
  if (affinity.dim(0) < s.experts || affinity.dim(1) != rows)
    fail(c, "expert_choice", "affinity", affinity, {s.experts, rows});
  Dispatch d{{rows, s.experts, s.batch * s.keep, 0}, {}, {}};
  d.rows = c.empty({s.experts * d.shape.slots}, DType::I32);
  d.slots = c.empty({s.experts, rows}, DType::I32);
  // Transposed, the affinity of E experts for B sequences is that of E * B sequences.
  const Tensor indices = c.empty({s.experts * d.shape.slots}, DType::I32);
  c.backend().top_k_rows(indices, affinity.rows(0, s.experts), s.experts * s.batch, s.seq, s.keep);
  c.backend().expert_slots(d.rows, d.slots, indices, d.shape);
  return d;
}

Tensor expert_gather(Context& c, const Tensor& x, const Dispatch& dispatch) {
  expect_matrix(c, "expert_gather", "x", x);
  ExpertShape s = dispatch.shape;
  s.width = x.dim(1);
  expect_shape(c, "expert_gather", "x", x, {s.rows, s.width});
  Tensor out = c.empty({s.experts * s.slots, s.width});
  c.backend().expert_gather_forward(out, x, dispatch.rows, s);
  if (wants_record(c, {x})) {
    c.tape()->record("expert_gather", {out}, [&c, x = x.without_data(), slots = dispatch.slots, s](Tape& t) {
      const Tensor dout = t.gradient();
      Tensor dx = c.empty(x.shape());
      c.backend().expert_gather_backward(dx, dout, slots, s);
      t.give(x, std::move(dx));
    });
  }
  return out;
}

Tensor expert_combine(Context& c, const Tensor& f, const Tensor& affinity, const Dispatch& dispatch) {
  expect_matrix(c, "expert_combine", "f", f);
  expect_matrix(c, "expert_combine", "affinity", affinity);
  ExpertShape s = dispatch.shape;
  s.width = f.dim(1);
  expect_shape(c, "expert_combine", "f", f, {s.experts * s.slots, s.width});
  if (affinity.dim(0) < s.experts || affinity.dim(1) != s.rows)
    fail(c, "expert_combine", "affinity", affinity, {s.experts, s.rows});
  Tensor y = c.empty({s.rows, s.width});
  c.backend().expert_combine_forward(y, f, affinity.rows(0, s.experts), dispatch.slots, s);
  c.check("expert_combine", "", y);
  if (wants_record(c, {f, affinity})) {
    c.tape()->record("expert_combine", {y}, [&c, f, affinity, rows = dispatch.rows, s](Tape& t) {
      const Tensor dy = t.gradient();
      Tensor df = c.empty(f.shape());
      Tensor daffinity = c.empty_stat(affinity.shape());
      const std::int64_t choices = affinity.dim(0);
      if (choices > s.experts) c.backend().fill(daffinity.rows(s.experts, choices), 0.0);
      c.backend().expert_combine_backward(df, daffinity.rows(0, s.experts), dy, f,
                                          affinity.rows(0, s.experts), rows, s);
      t.give(f, std::move(df));
      t.give(affinity, std::move(daffinity));
    });
  }
  return y;
}

}  // namespace fathom::ops
