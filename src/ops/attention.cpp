#include "src/ops/attention.h"

#include <cmath>

#include "kernels/error.h"
#include "src/ops/check.h"

namespace fathom::ops {

// By value: who gives the only handle away lets it be rotated in place.
// NOLINTNEXTLINE(performance-unnecessary-value-param)
Tensor rope(Context& c, Tensor qkv, const Tensor& positions, const Tensor& q_norm, const Tensor& k_norm,
            const RopeOptions& options) {
  const std::int64_t groups = options.heads + 2 * options.kv_heads;
  if (qkv.shape().rank() != 2 || qkv.dim(1) % groups != 0) fail(c, "rope", "qkv", qkv, Shape{-1, groups});
  const QkvShape s{qkv.dim(0),    options.heads,    options.kv_heads, qkv.dim(1) / groups,
                   options.theta, options.norm_eps, options.scaling};
  expect_shape(c, "rope", "positions", positions, {s.rows});
  if (q_norm.defined() || k_norm.defined()) {
    expect_shape(c, "rope", "q_norm", q_norm, {s.head_dim});
    expect_shape(c, "rope", "k_norm", k_norm, {s.head_dim});
  }
  const bool in_place = !q_norm.defined() && qkv.owners() == 1;
  Tensor out = in_place ? qkv.detach() : c.empty(qkv.shape());
  const Tensor rstd = q_norm.defined() ? c.empty_stat({s.rows, s.heads + s.kv_heads}) : Tensor();
  c.backend().rope_forward(out, rstd, qkv, positions, q_norm, k_norm, s);
  c.check("rope", "", out);
  if (wants_record(c, {qkv, q_norm, k_norm})) {
    // A rotation's backward needs no input; the norm's does.
    const Tensor saved = q_norm.defined() ? qkv : Tensor();
    c.tape()->record("rope", {out},
                     [&c, input = qkv.without_data(), saved, rstd, positions, q_norm, k_norm, s](Tape& t) {
                       const Tensor dout = t.gradient();
                       const bool normed = q_norm.defined();
                       // In place, unless the norm reads it again or another tensor has the same gradient.
                       Tensor dqkv = normed || dout.owners() > 1 ? c.empty(dout.shape()) : dout;
                       c.backend().rope_backward(dqkv, normed ? t.sum_into(q_norm) : Tensor(),
                                                 normed ? t.sum_into(k_norm) : Tensor(), dout, saved, rstd,
                                                 positions, q_norm, k_norm, s);
                       t.give(input, std::move(dqkv));
                     });
  }
  return out;
}

// NOLINTNEXTLINE(performance-unnecessary-value-param): as rope
Tensor cache_round_trip(Context& c, Tensor qkv, const Tensor& key_means, const CacheCodeOptions& options) {
  const std::int64_t groups = options.heads + 2 * options.kv_heads;
  if (qkv.shape().rank() != 2 || qkv.dim(1) % groups != 0)
    fail(c, "cache_round_trip", "qkv", qkv, Shape{-1, groups});
  if (wants_record(c, {qkv})) throw InternalError("[cache_round_trip] codes have no gradient");
  Tensor out = qkv.owners() == 1 ? qkv.detach() : c.empty(qkv.shape());
  c.backend().cache_round_trip(out, qkv,
                               {.rows = qkv.dim(0),
                                .heads = options.heads,
                                .kv_heads = options.kv_heads,
                                .head_dim = qkv.dim(1) / groups,
                                .bits = options.bits,
                                .key_means = key_means});
  c.check("cache_round_trip", "", out);
  return out;
}

Tensor attention(Context& c, const Tensor& qkv, const Tensor& first_key, const AttentionOptions& options) {
  const std::int64_t groups = options.heads + 2 * options.kv_heads;
  const std::int64_t rows = options.batch * options.seq;
  if (qkv.shape().rank() != 2 || qkv.dim(0) != rows || qkv.dim(1) % groups != 0) {
    fail(c, "attention", "qkv", qkv, Shape{rows, groups});
  }
  const std::int64_t head_dim = qkv.dim(1) / groups;
  const AttentionShape s{options.batch,    options.seq, options.heads,
                         options.kv_heads, head_dim,    1.0 / std::sqrt(static_cast<double>(head_dim))};
  if (first_key.defined()) expect_shape(c, "attention", "first_key", first_key, {rows});
  Tensor out = c.empty({rows, s.heads * head_dim});
  const Tensor lse = c.empty_stat({s.batch, s.heads, s.seq});
  c.backend().attention_forward(out, lse, qkv, first_key, s);
  c.check("attention", "", out);
  if (wants_record(c, {qkv})) {
    c.tape()->record("attention", {out}, [&c, qkv, first_key, out = out.detach(), lse, s](Tape& t) {
      const Tensor dout = t.gradient();
      Tensor dqkv = c.empty(qkv.shape());
      c.backend().attention_backward(dqkv, dout, out, lse, qkv, first_key, s);
      t.give(qkv, std::move(dqkv));
    });
  }
  return out;
}

}  // namespace fathom::ops
