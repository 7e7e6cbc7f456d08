// A backend that leaves everything to another one: what a test of one answer derives from.
#pragma once

#include <memory>
#include <utility>

#include "kernels/backend.h"
#include "kernels/decoder.h"

namespace fathom::testing_support {

class ForwardingBackend : public Backend {
 public:
  explicit ForwardingBackend(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  std::string description() const override { return inner_->description(); }
  bool is_cpu() const override { return inner_->is_cpu(); }
  const BackendOptions& options() const override { return inner_->options(); }
  std::int64_t head_chunk_rows() const override { return inner_->head_chunk_rows(); }
  std::int64_t memory_bytes() const override { return inner_->memory_bytes(); }
  std::int64_t free_memory_bytes() const override { return inner_->free_memory_bytes(); }
  std::int64_t workspace_bytes() const override { return inner_->workspace_bytes(); }
  std::int64_t most_head_dim() const override { return inner_->most_head_dim(); }
  void* allocate(std::size_t bytes) override { return inner_->allocate(bytes); }
  void release(void* data, std::size_t bytes) noexcept override { inner_->release(data, bytes); }
  void copy_from_host(void* destination, const void* host, std::size_t bytes) override {
    inner_->copy_from_host(destination, host, bytes);
  }
  void copy_to_host(void* host, const void* source, std::size_t bytes) override {
    inner_->copy_to_host(host, source, bytes);
  }
  std::unique_ptr<Readback> make_readback(std::size_t bytes) override { return inner_->make_readback(bytes); }
  void copy(View out, ConstView in) override { inner_->copy(out, in); }
  void copy_rows(View out, ConstView in, std::int64_t rows, std::int64_t width,
                 std::int64_t in_row) override {
    inner_->copy_rows(out, in, rows, width, in_row);
  }
  void synchronize() override { inner_->synchronize(); }
  bool can_capture() const override { return inner_->can_capture(); }
  void begin_capture() override { inner_->begin_capture(); }
  std::unique_ptr<CapturedWork> end_capture() override { return inner_->end_capture(); }
  void abandon_capture() noexcept override { inner_->abandon_capture(); }
  void fill(View out, double value) override { inner_->fill(out, value); }
  void fill_normal(View out, double stddev, std::uint64_t seed, std::uint64_t stream) override {
    inner_->fill_normal(out, stddev, seed, stream);
  }
  void fill_normal_from(View out, double stddev, const NormalNumbers& from) override {
    inner_->fill_normal_from(out, stddev, from);
  }
  void cast(View out, ConstView in) override { inner_->cast(out, in); }
  void add(View out, ConstView a, ConstView b) override { inner_->add(out, a, b); }
  void accumulate(View out, ConstView in) override { inner_->accumulate(out, in); }
  void scale(View out, double factor) override { inner_->scale(out, factor); }
  void sum(View out, ConstView in) override { inner_->sum(out, in); }
  void sum_squares(View out, ConstView in) override { inner_->sum_squares(out, in); }
  std::int64_t count_nonfinite(ConstView in) override { return inner_->count_nonfinite(in); }
  void linear_forward(View y, ConstView x, ConstView w, const LinearShape& s) override {
    inner_->linear_forward(y, x, w, s);
  }
  void linear_add_forward(View y, ConstView base, ConstView x, ConstView w, const LinearShape& s) override {
    inner_->linear_add_forward(y, base, x, w, s);
  }
  void linear_packed_forward(View y, ConstView x, const PackedView& w, const LinearShape& s) override {
    inner_->linear_packed_forward(y, x, w, s);
  }
  void linear_codes_forward(View y, const PackedView& x, const PackedView& w, const LinearShape& s) override {
    inner_->linear_codes_forward(y, x, w, s);
  }
  void linear_codes_add_forward(View y, ConstView base, const PackedView& x, const PackedView& w,
                                const LinearShape& s) override {
    inner_->linear_codes_add_forward(y, base, x, w, s);
  }
  bool make_codes(View codes, View scales, const CodeSource& from, const RowQuantization& s) override {
    return inner_->make_codes(codes, scales, from, s);
  }
  void linear_backward_input(View dx, ConstView dy, ConstView w, const LinearShape& s) override {
    inner_->linear_backward_input(dx, dy, w, s);
  }
  void linear_backward_weight(View dw, ConstView dy, ConstView x, const LinearShape& s) override {
    inner_->linear_backward_weight(dw, dy, x, s);
  }
  void linear_backward_weight_accumulate(View dw, ConstView dy, ConstView x, const LinearShape& s) override {
    inner_->linear_backward_weight_accumulate(dw, dy, x, s);
  }
  void quantize_rows(View codes, View scales, ConstView x, const RowQuantization& s) override {
    inner_->quantize_rows(codes, scales, x, s);
  }
  void hadamard_forward(View y, ConstView x, ConstView matrix, const HadamardShape& s) override {
    inner_->hadamard_forward(y, x, matrix, s);
  }
  void embedding_forward(View out, ConstView table, ConstView tokens, std::int64_t rows,
                         std::int64_t width) override {
    inner_->embedding_forward(out, table, tokens, rows, width);
  }
  void embedding_backward_accumulate(View dtable, ConstView dout, ConstView tokens, std::int64_t rows,
                                     std::int64_t width) override {
    inner_->embedding_backward_accumulate(dtable, dout, tokens, rows, width);
  }
  void rms_norm_forward(View y, View rstd, ConstView x, ConstView w, const NormShape& s) override {
    inner_->rms_norm_forward(y, rstd, x, w, s);
  }
  void rms_norm_backward(View dx, View dw_accumulate, ConstView dy, ConstView x, ConstView w, ConstView rstd,
                         const NormShape& s) override {
    inner_->rms_norm_backward(dx, dw_accumulate, dy, x, w, rstd, s);
  }
  void add_rms_norm_forward(View h, View y, View rstd, ConstView x, ConstView a, ConstView w,
                            const NormShape& s) override {
    inner_->add_rms_norm_forward(h, y, rstd, x, a, w, s);
  }
  void add_rms_norm_backward(View dx, View dw_accumulate, ConstView dh, ConstView dy, ConstView h,
                             ConstView w, ConstView rstd, const NormShape& s) override {
    inner_->add_rms_norm_backward(dx, dw_accumulate, dh, dy, h, w, rstd, s);
  }
  void rms_norm_backward_from_output(View dx, View dw_accumulate, ConstView dh, ConstView dy, ConstView y,
                                     ConstView w, ConstView rstd, const NormShape& s) override {
    inner_->rms_norm_backward_from_output(dx, dw_accumulate, dh, dy, y, w, rstd, s);
  }
  void rope_forward(View out, View rstd, ConstView qkv, ConstView positions, ConstView q_weight,
                    ConstView k_weight, const QkvShape& s) override {
    inner_->rope_forward(out, rstd, qkv, positions, q_weight, k_weight, s);
  }
  void rope_backward(View dqkv, View dq_weight_accumulate, View dk_weight_accumulate, ConstView dout,
                     ConstView qkv, ConstView rstd, ConstView positions, ConstView q_weight,
                     ConstView k_weight, const QkvShape& s) override {
    inner_->rope_backward(dqkv, dq_weight_accumulate, dk_weight_accumulate, dout, qkv, rstd, positions,
                          q_weight, k_weight, s);
  }
  void attention_forward(View out, View lse, ConstView qkv, ConstView first_key,
                         const AttentionShape& s) override {
    inner_->attention_forward(out, lse, qkv, first_key, s);
  }
  void attention_backward(View dqkv, ConstView dout, ConstView out, ConstView lse, ConstView qkv,
                          ConstView first_key, const AttentionShape& s) override {
    inner_->attention_backward(dqkv, dout, out, lse, qkv, first_key, s);
  }
  void first_keys(View first_key, ConstView documents, std::int64_t batch, std::int64_t seq) override {
    inner_->first_keys(first_key, documents, batch, seq);
  }
  void cache_append(View pool, ConstView qkv, ConstView tables, ConstView sequences, ConstView lengths,
                    const CacheShape& s) override {
    inner_->cache_append(pool, qkv, tables, sequences, lengths, s);
  }
  void cache_round_trip(View out, ConstView qkv, const CacheShape& s) override {
    inner_->cache_round_trip(out, qkv, s);
  }
  void cache_copy(View pool, ConstView from, ConstView to, std::int64_t entries,
                  const CacheShape& s) override {
    inner_->cache_copy(pool, from, to, entries, s);
  }
  void cache_chunk_scores(View scores, ConstView pool, ConstView query, ConstView table, std::int64_t chunks,
                          std::int64_t chunk, const CacheShape& s) override {
    inner_->cache_chunk_scores(scores, pool, query, table, chunks, chunk, s);
  }
  void cached_attention(View out, ConstView pool, ConstView qkv, ConstView tables, ConstView sequences,
                        ConstView lengths, const CacheShape& s) override {
    inner_->cached_attention(out, pool, qkv, tables, sequences, lengths, s);
  }
  bool choose_tokens(std::span<TokenPick> picks, ConstView logits, std::int64_t vocab,
                     std::int64_t choices) override {
    return inner_->choose_tokens(picks, logits, vocab, choices);
  }
  bool keeps_rows() const override { return inner_->keeps_rows(); }
  void make_shares(View shares, ConstView logits, std::int64_t rows, std::int64_t vocab, std::int64_t choices,
                   double temperature) override {
    inner_->make_shares(shares, logits, rows, vocab, choices, temperature);
  }
  void ask_shares(std::span<ShareQuestion> questions, std::int64_t choices) override {
    inner_->ask_shares(questions, choices);
  }
  std::unique_ptr<Decoder> make_decoder(const DecoderModel& model) override {
    return inner_->make_decoder(model);
  }
  void swiglu_forward(View h, ConstView gate_up, std::int64_t rows, std::int64_t hidden) override {
    inner_->swiglu_forward(h, gate_up, rows, hidden);
  }
  void swiglu_backward(View dgate_up, ConstView dh, ConstView gate_up, std::int64_t rows,
                       std::int64_t hidden) override {
    inner_->swiglu_backward(dgate_up, dh, gate_up, rows, hidden);
  }
  void swiglu_forward_beside_gate(View gate_h, ConstView gate_up, std::int64_t rows,
                                  std::int64_t hidden) override {
    inner_->swiglu_forward_beside_gate(gate_h, gate_up, rows, hidden);
  }
  void swiglu_backward_from_output(View dgate_up, ConstView dh, ConstView gate_h, std::int64_t rows,
                                   std::int64_t hidden) override {
    inner_->swiglu_backward_from_output(dgate_up, dh, gate_h, rows, hidden);
  }
  void bias_silu_forward(View h, ConstView x, ConstView bias, std::int64_t rows,
                         std::int64_t width) override {
    inner_->bias_silu_forward(h, x, bias, rows, width);
  }
  void bias_silu_backward(View dx, View dbias_accumulate, ConstView dh, ConstView x, ConstView bias,
                          std::int64_t rows, std::int64_t width) override {
    inner_->bias_silu_backward(dx, dbias_accumulate, dh, x, bias, rows, width);
  }
  void row_score_forward(View r, ConstView x, ConstView w, ConstView bias, std::int64_t rows,
                         std::int64_t width) override {
    inner_->row_score_forward(r, x, w, bias, rows, width);
  }
  void row_score_backward_accumulate(View dx, View dw, View dbias, ConstView dr, ConstView x, ConstView w,
                                     std::int64_t rows, std::int64_t width) override {
    inner_->row_score_backward_accumulate(dx, dw, dbias, dr, x, w, rows, width);
  }
  void top_k_rows(View indices, ConstView scores, std::int64_t batch, std::int64_t seq,
                  std::int64_t keep) override {
    inner_->top_k_rows(indices, scores, batch, seq, keep);
  }
  std::int64_t select_above(View indices, View offsets, ConstView scores, double threshold,
                            std::int64_t batch, std::int64_t seq) override {
    return inner_->select_above(indices, offsets, scores, threshold, batch, seq);
  }
  void gather_rows_forward(View out, ConstView x, ConstView indices, const GatherShape& s) override {
    inner_->gather_rows_forward(out, x, indices, s);
  }
  void gather_rows_backward_accumulate(View dx, ConstView dout, ConstView indices,
                                       const GatherShape& s) override {
    inner_->gather_rows_backward_accumulate(dx, dout, indices, s);
  }
  void gather_int32(View out, ConstView in, ConstView indices) override {
    inner_->gather_int32(out, in, indices);
  }
  void gated_scatter_forward(View y, ConstView x, ConstView f, ConstView r, ConstView indices, GateKind gate,
                             const GatherShape& s) override {
    inner_->gated_scatter_forward(y, x, f, r, indices, gate, s);
  }
  void gated_scatter_backward(View df, View dr_accumulate, ConstView dy, ConstView f, ConstView r,
                              ConstView indices, GateKind gate, const GatherShape& s) override {
    inner_->gated_scatter_backward(df, dr_accumulate, dy, f, r, indices, gate, s);
  }
  void expert_affinity_forward(View affinity, View lse, ConstView logits, std::int64_t rows,
                               std::int64_t choices) override {
    inner_->expert_affinity_forward(affinity, lse, logits, rows, choices);
  }
  void expert_affinity_backward(View dlogits, ConstView daffinity, ConstView dlse, ConstView affinity,
                                std::int64_t rows, std::int64_t choices) override {
    inner_->expert_affinity_backward(dlogits, daffinity, dlse, affinity, rows, choices);
  }
  void choice_scores_forward(View scores, ConstView logits, ConstView bias, std::int64_t rows,
                             std::int64_t choices) override {
    inner_->choice_scores_forward(scores, logits, bias, rows, choices);
  }
  void choice_scores_backward(View dlogits, View dbias_accumulate, ConstView dscores, std::int64_t rows,
                              std::int64_t choices) override {
    inner_->choice_scores_backward(dlogits, dbias_accumulate, dscores, rows, choices);
  }
  void expert_slots(View rows, View slots, ConstView indices, const ExpertShape& s) override {
    inner_->expert_slots(rows, slots, indices, s);
  }
  void expert_gather_forward(View out, ConstView x, ConstView rows, const ExpertShape& s) override {
    inner_->expert_gather_forward(out, x, rows, s);
  }
  void expert_gather_backward(View dx, ConstView dout, ConstView slots, const ExpertShape& s) override {
    inner_->expert_gather_backward(dx, dout, slots, s);
  }
  void expert_combine_forward(View y, ConstView f, ConstView weights, ConstView slots,
                              const ExpertShape& s) override {
    inner_->expert_combine_forward(y, f, weights, slots, s);
  }
  void expert_combine_backward(View df, View dweights, ConstView dy, ConstView f, ConstView weights,
                               ConstView rows, const ExpertShape& s) override {
    inner_->expert_combine_backward(df, dweights, dy, f, weights, rows, s);
  }
  void token_choice_forward(View weights, ConstView affinity, std::int64_t rows, std::int64_t choices,
                            std::int64_t top_k) override {
    inner_->token_choice_forward(weights, affinity, rows, choices, top_k);
  }
  void token_choice_backward(View daffinity, ConstView dweights, ConstView affinity, ConstView weights,
                             std::int64_t rows, std::int64_t choices, std::int64_t top_k) override {
    inner_->token_choice_backward(daffinity, dweights, affinity, weights, rows, choices, top_k);
  }
  void expert_fill(View rows, View slots, ConstView weights, std::int64_t seq,
                   const ExpertShape& s) override {
    inner_->expert_fill(rows, slots, weights, seq, s);
  }
  void expert_statistics(View out, ConstView affinity, ConstView weights, ConstView slots,
                         std::int64_t choices, const ExpertShape& s) override {
    inner_->expert_statistics(out, affinity, weights, slots, choices, s);
  }
  void cross_entropy(View losses, View gradient, ConstView logits, ConstView targets, std::int64_t rows,
                     std::int64_t vocab, double gradient_scale) override {
    inner_->cross_entropy(losses, gradient, logits, targets, rows, vocab, gradient_scale);
  }
  void membership_bce(View losses, View dr, ConstView r, ConstView indices, std::int64_t rows,
                      double gradient_scale) override {
    inner_->membership_bce(losses, dr, r, indices, rows, gradient_scale);
  }
  void balance_loss(View losses, View daffinity, ConstView affinity, ConstView weights,
                    const SequenceChoices& s, double gradient_scale) override {
    inner_->balance_loss(losses, daffinity, affinity, weights, s, gradient_scale);
  }
  void square_loss(View losses, View dx, ConstView x, double gradient_scale) override {
    inner_->square_loss(losses, dx, x, gradient_scale);
  }
  void routing_statistics(View out, ConstView r, ConstView p, ConstView indices, double threshold_logit,
                          std::int64_t rows) override {
    inner_->routing_statistics(out, r, p, indices, threshold_logit, rows);
  }
  void adamw(View master, View working, View m, View v, ConstView gradient, ConstView numbers,
             const AdamWParams& p) override {
    inner_->adamw(master, working, m, v, gradient, numbers, p);
  }
  void judge_step(View numbers, View mean, View applied, ConstView losses, ConstView squares,
                  const StepRule& rule) override {
    inner_->judge_step(numbers, mean, applied, losses, squares, rule);
  }

 protected:
  Backend& inner() const { return *inner_; }

 private:
  std::unique_ptr<Backend> inner_;
};

}  // namespace fathom::testing_support
