// The CPU backend. This folder is compiled once for each instruction set, in the namespace
// fathom::cpu::FATHOM_ISA.
//
// Because the same code exists several times in one program, nothing here may be shared between the copies by
// the linker: templates and inline functions live in the ISA's namespace, and the standard library is used
// only through functions that the dispatching room compiles for every processor (kernels/cpu/host.h).
#pragma once

#include <cstdint>
#include <string>

#include "kernels/backend.h"
#include "kernels/cpu/isa/rope_table.h"

#ifndef FATHOM_ISA
#error "compile this folder with -DFATHOM_ISA=portable, avx2 or avx512"
#endif

namespace fathom::cpu::FATHOM_ISA {

class CpuBackend final : public Backend {
 public:
  CpuBackend(const BackendOptions& options, int threads) : options_(options), threads_(threads) {}

  std::string description() const override;
  bool is_cpu() const override { return true; }
  const BackendOptions& options() const override { return options_; }

  void* allocate(std::size_t bytes) override;
  void release(void* data, std::size_t bytes) noexcept override;
  void copy_from_host(void* destination, const void* host, std::size_t bytes) override;
  void copy_to_host(void* host, const void* source, std::size_t bytes) override;
  void copy(View out, ConstView in) override;
  void copy_rows(View out, ConstView in, std::int64_t rows, std::int64_t width, std::int64_t in_row) override;
  void synchronize() override;
  void fill(View out, double value) override;
  void fill_normal(View out, double stddev, std::uint64_t seed, std::uint64_t stream) override;
  void fill_normal_from(View out, double stddev, const NormalNumbers& from) override;
  void cast(View out, ConstView in) override;
  void add(View out, ConstView a, ConstView b) override;
  void accumulate(View out, ConstView in) override;
  void scale(View out, double factor) override;
  void sum(View out, ConstView in) override;
  void sum_squares(View out, ConstView in) override;
  std::int64_t count_nonfinite(ConstView in) override;
  void linear_forward(View y, ConstView x, ConstView w, const LinearShape& s) override;
  void linear_packed_forward(View y, ConstView x, const PackedView& w, const LinearShape& s) override;
  void linear_codes_forward(View y, const PackedView& x, const PackedView& w, const LinearShape& s) override;
  void quantize_rows(View codes, View scales, ConstView x, const RowQuantization& s) override;
  void hadamard_forward(View y, ConstView x, ConstView matrix, const HadamardShape& s) override;
  void linear_backward_input(View dx, ConstView dy, ConstView w, const LinearShape& s) override;
  void linear_backward_weight(View dw, ConstView dy, ConstView x, const LinearShape& s) override;
  void linear_backward_weight_accumulate(View dw, ConstView dy, ConstView x, const LinearShape& s) override;
  void embedding_forward(View out, ConstView table, ConstView tokens, std::int64_t rows,
                         std::int64_t width) override;
  void embedding_backward_accumulate(View dtable, ConstView dout, ConstView tokens, std::int64_t rows,
                                     std::int64_t width) override;
  void rms_norm_forward(View y, View rstd, ConstView x, ConstView w, const NormShape& s) override;
  void rms_norm_backward(View dx, View dw_accumulate, ConstView dy, ConstView x, ConstView w, ConstView rstd,
                         const NormShape& s) override;
  void add_rms_norm_forward(View h, View y, View rstd, ConstView x, ConstView a, ConstView w,
                            const NormShape& s) override;
  void add_rms_norm_backward(View dx, View dw_accumulate, ConstView dh, ConstView dy, ConstView h,
                             ConstView w, ConstView rstd, const NormShape& s) override;
  void rms_norm_backward_from_output(View dx, View dw_accumulate, ConstView dh, ConstView dy, ConstView y,
                                     ConstView w, ConstView rstd, const NormShape& s) override;
  void rope_forward(View out, View rstd, ConstView qkv, ConstView positions, ConstView q_weight,
                    ConstView k_weight, const QkvShape& s) override;
  void rope_backward(View dqkv, View dq_weight_accumulate, View dk_weight_accumulate, ConstView dout,
                     ConstView qkv, ConstView rstd, ConstView positions, ConstView q_weight,
                     ConstView k_weight, const QkvShape& s) override;
  void attention_forward(View out, View lse, ConstView qkv, ConstView first_key,
                         const AttentionShape& s) override;
  void attention_backward(View dqkv, ConstView dout, ConstView out, ConstView lse, ConstView qkv,
                          ConstView first_key, const AttentionShape& s) override;
  void first_keys(View first_key, ConstView documents, std::int64_t batch, std::int64_t seq) override;
  void cache_append(View pool, ConstView qkv, ConstView tables, ConstView sequences, ConstView lengths,
                    const CacheShape& s) override;
  void cached_attention(View out, ConstView pool, ConstView qkv, ConstView tables, ConstView sequences,
                        ConstView lengths, const CacheShape& s) override;
  void cache_round_trip(View out, ConstView qkv, const CacheShape& s) override;
  void cache_copy(View pool, ConstView from, ConstView to, std::int64_t entries,
                  const CacheShape& s) override;
  void cache_chunk_scores(View scores, ConstView pool, ConstView query, ConstView table, std::int64_t chunks,
                          std::int64_t chunk, const CacheShape& s) override;
  void swiglu_forward(View h, ConstView gate_up, std::int64_t rows, std::int64_t hidden) override;
  void swiglu_backward(View dgate_up, ConstView dh, ConstView gate_up, std::int64_t rows,
                       std::int64_t hidden) override;
  void swiglu_forward_beside_gate(View gate_h, ConstView gate_up, std::int64_t rows,
                                  std::int64_t hidden) override;
  void swiglu_backward_from_output(View dgate_up, ConstView dh, ConstView gate_h, std::int64_t rows,
                                   std::int64_t hidden) override;
  void bias_silu_forward(View h, ConstView x, ConstView bias, std::int64_t rows, std::int64_t width) override;
  void bias_silu_backward(View dx, View dbias_accumulate, ConstView dh, ConstView x, ConstView bias,
                          std::int64_t rows, std::int64_t width) override;
  void row_score_forward(View r, ConstView x, ConstView w, ConstView bias, std::int64_t rows,
                         std::int64_t width) override;
  void row_score_backward_accumulate(View dx, View dw, View dbias, ConstView dr, ConstView x, ConstView w,
                                     std::int64_t rows, std::int64_t width) override;
  void top_k_rows(View indices, ConstView scores, std::int64_t batch, std::int64_t seq,
                  std::int64_t keep) override;
  std::int64_t select_above(View indices, View offsets, ConstView scores, double threshold,
                            std::int64_t batch, std::int64_t seq) override;
  void make_shares(View shares, ConstView logits, std::int64_t rows, std::int64_t vocab, std::int64_t choices,
                   double temperature) override;
  void ask_shares(std::span<ShareQuestion> questions, std::int64_t choices) override;
  void gather_rows_forward(View out, ConstView x, ConstView indices, const GatherShape& s) override;
  void gather_rows_backward_accumulate(View dx, ConstView dout, ConstView indices,
                                       const GatherShape& s) override;
  void gather_int32(View out, ConstView in, ConstView indices) override;
  void gated_scatter_forward(View y, ConstView x, ConstView f, ConstView r, ConstView indices, GateKind gate,
                             const GatherShape& s) override;
  void gated_scatter_backward(View df, View dr_accumulate, ConstView dy, ConstView f, ConstView r,
                              ConstView indices, GateKind gate, const GatherShape& s) override;
  void expert_affinity_forward(View affinity, View lse, ConstView logits, std::int64_t rows,
                               std::int64_t choices) override;
  void expert_affinity_backward(View dlogits, ConstView daffinity, ConstView dlse, ConstView affinity,
                                std::int64_t rows, std::int64_t choices) override;
  void choice_scores_forward(View scores, ConstView logits, ConstView bias, std::int64_t rows,
                             std::int64_t choices) override;
  void choice_scores_backward(View dlogits, View dbias_accumulate, ConstView dscores, std::int64_t rows,
                              std::int64_t choices) override;
  void expert_slots(View rows, View slots, ConstView indices, const ExpertShape& s) override;
  void expert_gather_forward(View out, ConstView x, ConstView rows, const ExpertShape& s) override;
  void expert_gather_backward(View dx, ConstView dout, ConstView slots, const ExpertShape& s) override;
  void expert_combine_forward(View y, ConstView f, ConstView weights, ConstView slots,
                              const ExpertShape& s) override;
  void expert_combine_backward(View df, View dweights, ConstView dy, ConstView f, ConstView weights,
                               ConstView rows, const ExpertShape& s) override;
  void token_choice_forward(View weights, ConstView affinity, std::int64_t rows, std::int64_t choices,
                            std::int64_t top_k) override;
  void token_choice_backward(View daffinity, ConstView dweights, ConstView affinity, ConstView weights,
                             std::int64_t rows, std::int64_t choices, std::int64_t top_k) override;
  void expert_fill(View rows, View slots, ConstView weights, std::int64_t seq, const ExpertShape& s) override;
  void expert_statistics(View out, ConstView affinity, ConstView weights, ConstView slots,
                         std::int64_t choices, const ExpertShape& s) override;
  void cross_entropy(View losses, View gradient, ConstView logits, ConstView targets, std::int64_t rows,
                     std::int64_t vocab, double gradient_scale) override;
  void membership_bce(View losses, View dr, ConstView r, ConstView indices, std::int64_t rows,
                      double gradient_scale) override;
  void balance_loss(View losses, View daffinity, ConstView affinity, ConstView weights,
                    const SequenceChoices& s, double gradient_scale) override;
  void square_loss(View losses, View dx, ConstView x, double gradient_scale) override;
  void routing_statistics(View out, ConstView r, ConstView p, ConstView indices, double threshold_logit,
                          std::int64_t rows) override;
  void adamw(View master, View working, View m, View v, ConstView gradient, ConstView numbers,
             const AdamWParams& p) override;
  void judge_step(View numbers, View mean, View applied, ConstView losses, ConstView squares,
                  const StepRule& rule) override;

 private:
  BackendOptions options_;
  int threads_;
  RopeTable<float> rope_f32_;
  RopeTable<double> rope_f64_;
};

/// What dispatch.cpp calls when the processor can run this copy.
Backend* make(const BackendOptions& options, int threads);

}  // namespace fathom::cpu::FATHOM_ISA
