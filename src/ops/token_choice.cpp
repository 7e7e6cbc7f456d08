#include "src/ops/token_choice.h"

#include "src/ops/check.h"
#include "src/ops/dispatch.h"

namespace fathom::ops {

Tensor token_choice(Context& c, const Tensor& affinity, std::int64_t top_k) {
  expect_matrix(c, "token_choice", "affinity", affinity);
  const std::int64_t choices = affinity.dim(0), rows = affinity.dim(1);
  Tensor weights = c.empty_stat(affinity.shape());
  c.backend().token_choice_forward(weights, affinity, rows, choices, top_k);
  c.check("token_choice", "", weights);
  if (wants_record(c, {affinity})) {
    // The closure reads the weights, which are its own output: detached, so that the tape does not keep
    // itself alive.
    c.tape()->record(
        "token_choice", {weights}, [&c, affinity, weights = weights.detach(), rows, choices, top_k](Tape& t) {
          const Tensor dweights = t.gradient();
          Tensor daffinity = c.empty_stat(affinity.shape());
          c.backend().token_choice_backward(daffinity, dweights, affinity, weights, rows, choices, top_k);
          t.give(affinity, std::move(daffinity));
        });
  }
  return weights;
}

Dispatch fill_slots(Context& c, const Tensor& weights, const ExpertSequences& s) {
  Dispatch d = empty_dispatch(c, "fill_slots", weights, s.experts, s.batch * s.seq, s.batch * s.keep);
  c.backend().expert_fill(d.rows, d.slots, weights.rows(0, s.experts), s.seq, d.shape);
  return d;
}

Tensor balance_loss(Context& c, const Tensor& affinity, const Tensor& weights, std::int64_t seq,
                    const LossOptions& options) {
  expect_matrix(c, "balance_loss", "affinity", affinity);
  expect_shape(c, "balance_loss", "weights", weights, affinity.shape());
  const SequenceChoices s{affinity.dim(1), seq, affinity.dim(0)};
  Tensor losses = c.empty_stat({s.rows / seq});
  const bool recording = wants_record(c, {affinity});
  const Tensor daffinity = recording ? c.empty_stat(affinity.shape()) : Tensor();
  c.backend().balance_loss(losses, daffinity, affinity, weights, s, options.gradient_scale);
  c.check("balance_loss", "", losses);
  if (recording) {
    c.tape()->record_loss("balance_loss", [affinity = affinity.without_data(), daffinity](Tape& t) {
      t.give(affinity, daffinity);
    });
  }
  return losses;
}

Tensor z_loss(Context& c, const Tensor& lse, const LossOptions& options) {
  Tensor losses = c.empty_stat(lse.shape());
  const bool recording = wants_record(c, {lse});
  const Tensor dlse = recording ? c.empty_stat(lse.shape()) : Tensor();
  c.backend().square_loss(losses, dlse, lse, options.gradient_scale);
  c.check("z_loss", "", losses);
  if (recording)
    c.tape()->record_loss("z_loss", [lse = lse.without_data(), dlse](Tape& t) { t.give(lse, dlse); });
  return losses;
}

}  // namespace fathom::ops
