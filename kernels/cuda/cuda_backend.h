// The CUDA backend: one GPU, one stream. Compute dtypes are fp32 and bf16, statistics fp32.
//
// Every op is asynchronous on the backend's stream; only copy_to_host, count_nonfinite, select_above,
// choose_tokens, ask_shares and synchronize wait. Where an op's files are: gemm.cpp (cuBLASLt),
// cudnn_attention.cpp, and one .cu a family.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <cuda_runtime_api.h>

#include "kernels/backend.h"
#include "kernels/cuda/handles.h"
#include "kernels/cuda/scratch.h"
#include "kernels/own_memory.h"

namespace fathom::cuda {

class Gemm;            // gemm.h
class CudnnAttention;  // cudnn_attention.h

class CudaBackend final : public Backend, public OwnMemory {
 public:
  /// UserError: no such device, or one that this build has no code for.
  CudaBackend(const BackendOptions& options, int device);
  ~CudaBackend() override;

  std::string description() const override;
  bool is_cpu() const override { return false; }
  const BackendOptions& options() const override { return options_; }
  std::int64_t head_chunk_rows() const override { return 8192; }

  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }
  int device() const { return device_; }

  /// Called again and again while the host waits for the device, with the seconds that it has waited; what it
  /// throws ends the wait. For who must not wait for ever: the device may wait for other processes' devices.
  using WhileWaiting = std::function<void(double seconds)>;
  void set_while_waiting(WhileWaiting look) { while_waiting_ = std::move(look); }
  /// Waits until the device has come to where `event` was recorded. Errors are check()'s, in the name of
  /// `op`.
  void wait_for(cudaEvent_t event, const char* op);

  std::int64_t memory_bytes() const override { return memory_bytes_; }
  std::int64_t free_memory_bytes() const override;
  std::int64_t workspace_bytes() const override;
  std::int64_t most_head_dim() const override { return 256; }  // of attention_rows.cu
  void* allocate(std::size_t bytes) override;
  void release(void* data, std::size_t bytes) noexcept override;
  void copy_from_host(void* destination, const void* host, std::size_t bytes) override;
  void copy_to_host(void* host, const void* source, std::size_t bytes) override;
  std::unique_ptr<Readback> make_readback(std::size_t bytes) override;
  void copy(View out, ConstView in) override;
  void copy_rows(View out, ConstView in, std::int64_t rows, std::int64_t width, std::int64_t in_row) override;
  void synchronize() override;
  /// Not with CUDA_LAUNCH_BLOCKING, which is set to learn which op faults: within a graph it cannot tell.
  bool can_capture() const override { return !launches_block_; }
  void begin_capture() override;
  std::unique_ptr<CapturedWork> end_capture() override;
  void abandon_capture() noexcept override;

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
  void linear_add_forward(View y, ConstView base, ConstView x, ConstView w, const LinearShape& s) override;
  void linear_packed_forward(View y, ConstView x, const PackedView& w, const LinearShape& s) override;
  void linear_codes_forward(View y, const PackedView& x, const PackedView& w, const LinearShape& s) override;
  void linear_codes_add_forward(View y, ConstView base, const PackedView& x, const PackedView& w,
                                const LinearShape& s) override;
  bool make_codes(View codes, View scales, const CodeSource& from, const RowQuantization& s) override;
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
  bool choose_tokens(std::span<TokenPick> picks, ConstView logits, std::int64_t vocab,
                     std::int64_t choices) override;
  bool keeps_rows() const override { return true; }
  void make_shares(View shares, ConstView logits, std::int64_t rows, std::int64_t vocab, std::int64_t choices,
                   double temperature) override;
  void ask_shares(std::span<ShareQuestion> questions, std::int64_t choices) override;
  std::unique_ptr<Decoder> make_decoder(const DecoderModel& model) override;
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
  /// Device memory for the op at hand, valid until the next op that asks: ops run one after the other on one
  /// stream. MemoryError: the device has no more, even after the allocator gave back what it does not use.
  void* scratch(std::size_t bytes);
  template <typename T>
  T* scratch_of(std::int64_t n) {
    return static_cast<T*>(scratch(static_cast<std::size_t>(n) * sizeof(T)));
  }
  /// The table of RoPE's inverse frequencies, fp32 [head_dim / 2], computed in double on the host.
  const float* rope_frequencies(const QkvShape& s);

  BackendOptions options_;
  int device_ = 0;
  int multiprocessors_ = 0;
  std::int64_t memory_bytes_ = 0;
  std::string name_;
  StreamHandle stream_owner_;      // all that follows goes before it does
  cudaStream_t stream_ = nullptr;  // the same
  bool capturing_ = false;
  bool launches_block_ = false;
  WhileWaiting while_waiting_;
  EventHandle reached_;               // by synchronize()
  Scratch scratch_;                   // its blocks are freed with the backend
  std::vector<PinnedMemory> pinned_;  // staging for copy_from_host, used in turn
  std::vector<EventHandle> pinned_free_;
  std::size_t next_pinned_ = 0;
  std::map<std::tuple<double, std::int64_t, RopeScaling>, DeviceMemory> rope_tables_;
  std::unique_ptr<Gemm> gemm_;
  std::unique_ptr<CudnnAttention> cudnn_;  // null: cuDNN is not there
};

}  // namespace fathom::cuda
