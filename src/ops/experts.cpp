#include "src/ops/experts.h"

#include <algorithm>

#include "src/ops/check.h"
#include "src/ops/dispatch.h"
#include "src/ops/routing.h"
#include "src/ops/weight_gradient.h"

namespace fathom::ops {

Tensor choice_logits(Context& c, const Tensor& x, const Tensor& w) {
  expect_matrix(c, "choice_logits", "w", w);
  const LinearShape s = linear_shape(c, "choice_logits", "x", x, w);
  Tensor logits = c.empty_stat({s.rows, s.out});  // not rounded to the compute dtype
  c.backend().linear_forward(logits, x, w, s);
  c.check("choice_logits", "", logits);
  if (wants_record(c, {x, w})) {
    c.tape()->record("choice_logits", {logits}, [&c, x, w, s](Tape& t) {
      Tensor dlogits = t.gradient();
      if (dlogits.dtype() != c.compute_dtype()) {
        const Tensor rounded = c.empty(dlogits.shape());
        c.backend().cast(rounded, dlogits);
        dlogits = rounded;
      }
      add_weight_gradient(c, t, w, dlogits, x, s);
      if (!x.requires_grad()) return;
      Tensor dx = c.empty(x.shape());
      c.backend().linear_backward_input(dx, dlogits, w, s);
      t.give(x, std::move(dx));
    });
  }
  return logits;
}

Affinity expert_affinity(Context& c, const Tensor& logits) {
  expect_matrix(c, "expert_affinity", "logits", logits);
  const std::int64_t rows = logits.dim(0), choices = logits.dim(1);
  Affinity out{c.empty_stat({choices, rows}), c.empty_stat({rows})};
  c.backend().expert_affinity_forward(out.affinity, out.lse, logits, rows, choices);
  c.check("expert_affinity", "", out.affinity);
  if (wants_record(c, {logits})) {
    // The closure reads the affinity, which is its own output: detached, so that the tape does not keep
    // itself alive.
    c.tape()->record(
        "expert_affinity", {out.affinity, out.lse},
        [&c, logits = logits.without_data(), affinity = out.affinity.detach(), rows, choices](Tape& t) {
          const Tensor daffinity = t.gradient(0), dlse = t.gradient(1);
          Tensor dlogits = c.empty_stat(logits.shape());
          c.backend().expert_affinity_backward(dlogits, daffinity, dlse, affinity, rows, choices);
          t.give(logits, std::move(dlogits));
        });
  }
  return out;
}

Tensor choice_scores(Context& c, const Tensor& logits, const Tensor& bias) {
  expect_matrix(c, "choice_scores", "logits", logits);
  const std::int64_t rows = logits.dim(0), choices = logits.dim(1);
  if (bias.defined()) expect_shape(c, "choice_scores", "bias", bias, {choices});
  Tensor scores = c.empty_stat({choices, rows});
  c.backend().choice_scores_forward(scores, logits, bias, rows, choices);
  c.check("choice_scores", "", scores);
  if (wants_record(c, {logits, bias})) {
    c.tape()->record("choice_scores", {scores},
                     [&c, logits = logits.without_data(), bias, rows, choices](Tape& t) {
                       const Tensor dscores = t.gradient();
                       const Tensor dbias = bias.defined() ? t.sum_into(bias) : Tensor();
                       Tensor dlogits = c.empty_stat(logits.shape());
                       c.backend().choice_scores_backward(dlogits, dbias, dscores, rows, choices);
                       t.give(logits, std::move(dlogits));
                     });
  }
  return scores;
}

Dispatch expert_choice(Context& c, const Tensor& affinity, const ExpertSequences& s) {
  Dispatch d = empty_dispatch(c, "expert_choice", affinity, s.experts, s.batch * s.seq, s.batch * s.keep);
  // Transposed, the affinity of so many choices for B sequences is that of choices * B sequences.
  const std::int64_t choices = affinity.dim(0);
  d.chosen = c.empty({choices * d.shape.slots}, DType::I32);
  c.backend().top_k_rows(d.chosen, affinity, choices * s.batch, s.seq, s.keep);
  c.backend().expert_slots(d.rows, d.slots, d.chosen.rows(0, d.rows.size()), d.shape);
  return d;
}

Dispatch experts_above(Context& c, const Tensor& scores, double threshold, std::int64_t experts) {
  expect_matrix(c, "experts_above", "scores", scores);
  const std::int64_t choices = scores.dim(0), rows = scores.dim(1);
  const Tensor room = c.empty({choices * rows}, DType::I32);
  const Tensor offsets = c.empty({choices + 1}, DType::I32);
  const std::int64_t kept = c.backend().select_above(room, offsets, scores, threshold, choices, rows);
  const std::vector<std::int32_t> begins = to_host<std::int32_t>(c.backend(), offsets);
  std::vector<std::int64_t> taken;
  for (std::size_t e = 0; e < static_cast<std::size_t>(experts); ++e)
    taken.push_back(begins[e + 1] - begins[e]);
  const std::int64_t busiest = std::max<std::int64_t>(1, *std::max_element(taken.begin(), taken.end()));
  Dispatch d = empty_dispatch(c, "experts_above", scores, experts, rows, busiest);
  d.chosen = room.rows(0, kept);
  d.taken = std::move(taken);
  // What is above the threshold is above 0 once it is subtracted: expert_fill's rule.
  const Tensor above = c.empty_stat({experts, rows});
  c.backend().fill(above, above.dtype() == DType::F32 ? -double{fp32_below(threshold)} : -threshold);
  c.backend().accumulate(above, scores.rows(0, experts));
  c.backend().expert_fill(d.rows, d.slots, above, rows, d.shape);
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
