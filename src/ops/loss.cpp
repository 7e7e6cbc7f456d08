#include "src/ops/loss.h"

#include <algorithm>

#include "src/ops/check.h"
#include "src/ops/weight_gradient.h"

namespace fathom::ops {

Tensor linear_cross_entropy(Context& c, const Tensor& x, const Tensor& w, const Tensor& targets,
                            const LossOptions& options) {
  expect_matrix(c, "linear_cross_entropy", "w", w);
  const std::int64_t width = w.dim(1);
  const std::int64_t vocab = w.dim(0);
  const std::int64_t rows = expect_rows(c, "linear_cross_entropy", "x", x, width);
  expect_shape(c, "linear_cross_entropy", "targets", targets, {rows});
  const FlopItem item(c, "head");
  const bool recording = wants_record(c, {x, w});
  const std::int64_t at_once = options.chunk_rows > 0 ? options.chunk_rows : c.backend().head_chunk_rows();
  const std::int64_t chunk = std::min(at_once, rows);
  Tensor losses = c.empty_stat({rows});
  const Tensor logits = c.empty({chunk, vocab}, c.compute_dtype(), MemoryTag::Workspace);
  Tensor dx = recording ? c.empty(x.shape()) : Tensor();
  Backend& backend = c.backend();
  for (std::int64_t begin = 0; begin < rows; begin += chunk) {
    const std::int64_t end = std::min(begin + chunk, rows);
    const LinearShape s{end - begin, width, vocab};
    const Tensor part = logits.rows(0, s.rows);
    const Tensor x_part = x.rows(begin, end);
    backend.linear_forward(part, x_part, w, s);
    c.check("head", "", part);
    backend.cross_entropy(losses.rows(begin, end), recording ? part.view() : View{}, part,
                          targets.rows(begin, end), s.rows, vocab, options.gradient_scale);
    if (!recording) continue;
    backend.linear_backward_input(dx.rows(begin, end), part, w, s);
    add_weight_gradient(c, *c.tape(), w, part, x_part, s);
  }
  c.check("cross_entropy", "", losses);
  if (recording) {
    c.check("head", " backward", dx);
    if (w.requires_grad()) c.check("head", " backward", c.tape()->sum_into(w));
    c.tape()->record_loss("cross_entropy", [x = x.without_data(), dx](Tape& t) { t.give(x, dx); });
  }
  return losses;
}

Tensor membership_bce(Context& c, const Tensor& r, const Tensor& indices, const LossOptions& options) {
  const std::int64_t rows = r.size();
  Tensor losses = c.empty_stat({rows});
  const bool recording = wants_record(c, {r});
  const Tensor dr = recording ? c.empty_stat(r.shape()) : Tensor();
  c.backend().membership_bce(losses, dr, r, indices, rows, options.gradient_scale);
  c.check("membership_bce", "", losses);
  if (recording) {
    c.tape()->record_loss("membership_bce", [r = r.without_data(), dr](Tape& t) { t.give(r, dr); });
  }
  return losses;
}

double sum(Context& c, const Tensor& x) {
  const Tensor total = c.empty_stat({1});
  c.backend().sum(total, x);
  return item(c.backend(), total);
}

}  // namespace fathom::ops
