// One transformer, Llama-style: RMSNorm before, RoPE, SwiGLU, grouped-query attention, optional QK-norm, tied
// or untied embeddings, no biases. Dense models, Mixture-of-Depths, experts and both together are
// configurations of it.
//
// Legend of shapes: B sequences, T tokens of a sequence, N = B*T rows, K kept tokens of a sequence, D width,
// H query heads, G key/value heads, d head size, F hidden width of the MLP, E experts, V vocabulary.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "src/autograd/recompute.h"
#include "src/model/attention_cache.h"
#include "src/model/product_input.h"
#include "src/model/quantization.h"
#include "src/model/selection.h"
#include "src/nn/parameters.h"
#include "src/ops/experts.h"
#include "src/ops/product.h"

namespace fathom {

/// Sequences to run, as device tensors of int32, each [B*T].
struct Batch {
  std::int64_t batch = 0;  // B
  std::int64_t seq = 0;    // T
  Tensor tokens;
  Tensor targets;    // undefined when no loss is wanted
  Tensor positions;  // within the sequence
  /// For each row the number of its document, counted over the whole batch (never falling); without document
  /// masks a sequence is one document.
  Tensor documents;
  bool document_mask = false;
  /// Not null: the rows (batch is 1) are new tokens of sequences that it knows, and attend over what these
  /// have in it. The rule is then causal, `documents` is not read, and nothing is recorded.
  AttentionCache* cache = nullptr;
};

/// The same on the host, so that the next batch can be made while the device is busy.
struct HostBatch {
  std::int64_t batch = 0;
  std::int64_t seq = 0;
  std::vector<std::int32_t> tokens, targets, positions, documents;
  bool document_mask = false;
};

/// `documents` numbers documents within each sequence (may be empty).
HostBatch make_host_batch(std::int64_t batch, std::int64_t seq, std::vector<std::int32_t> tokens,
                          std::vector<std::int32_t> targets, const std::vector<std::int32_t>& documents = {});
/// To new tensors.
Batch upload(Context& c, const HostBatch& host);
/// Over the tensors of a batch of the same shape, which captured work may read.
void upload_over(Context& c, const HostBatch& host, const Batch& batch);
/// make_host_batch, uploaded.
Batch make_batch(Context& c, std::int64_t batch, std::int64_t seq, const std::vector<std::int32_t>& tokens,
                 const std::vector<std::int32_t>& targets, const std::vector<std::int32_t>& documents = {});

/// What a routed block decided.
struct RoutedLayer {
  std::int64_t layer = 0;
  Tensor scores;     // r, stat [N]
  Tensor predicted;  // the predictor's logits, stat [N]; undefined without one
  Tensor indices;    // kept rows, int32
};

/// What the experts of a block decided, over the rows that the block computes.
struct ExpertLayer {
  std::int64_t layer = 0;
  std::int64_t seq = 0;  // rows of a sequence
  Tensor affinity;       // stat [E + no-ops, rows]: the softmax of the router, transposed
  Tensor lse;            // stat [rows]: the log of its sums of exponentials
  Tensor weights;        // token choice: what each row gives its choices [E + no-ops, rows]
  Tensor scores;         // expert choice: the router's logits, stat [E + no-ops, rows]; undefined if unused
  Tensor predicted;      // the predictor's logits, likewise; undefined without one
  ops::Dispatch dispatch;
};

struct ForwardResult {
  Tensor hidden;  // [N, D], after the final norm
  std::vector<RoutedLayer> routing;
  std::vector<ExpertLayer> experts;
};

/// Sees the residual stream [N, D] after `blocks` blocks: 0 is the embedding. Nothing is recorded meanwhile.
using StreamObserver = std::function<void(std::int64_t blocks, const Tensor& stream)>;

/// Sees the rows [rows, (H+2G)d] of a block as attention gets them, of a routed one those that it keeps, with
/// keys and values before they become codes. A block that no token went to is not shown.
using KeyObserver = std::function<void(const Tensor& qkv)>;

/// Sums over the rows of a batch, in nats, and how many rows there were.
struct LossSums {
  double cross_entropy = 0;
  double aux = 0;               // mean over routed layers
  double predictor = 0;         // mean over routed layers
  double balance = 0;           // of token choice, mean over its layers; as if each row had its sequence's
  double z = 0;                 // likewise
  double expert_aux = 0;        // of expert choice, mean over choices and layers; as if over the batch's rows
  double expert_predictor = 0;  // likewise
  std::int64_t rows = 0;
};

struct LossLayers {
  std::int64_t routed = 0;     // L
  std::int64_t experts = 0;    // X, of experts
  bool tokens_choose = false;  // in all X; else the experts
};

/// The same sums on the device, where a training step leaves them until its end: stat [1 + 2 L + 2 X],
/// cross-entropy, then BCE(router) and BCE(predictor) of each of the L routed layers (zeros where a layer has
/// no such loss), then of each of the X layers of experts the balance and the z-loss, where tokens choose, or
/// BCE(router) and BCE(predictor), where experts do.
struct DeviceLosses {
  Tensor sums;
  LossLayers layers;
  std::int64_t rows = 0;
};
/// Waits for the device.
LossSums read_losses(Context& c, const DeviceLosses& losses);
/// From the values of DeviceLosses::sums.
LossSums loss_sums_of(const double* sums, const LossLayers& layers, std::int64_t rows);

/// The parameters of a model, declared and not allocated: what it would need. The config must be resolved.
ParameterSet declare_parameters(const ModelConfig& model, const RoutingConfig& routing);

class Transformer {
 public:
  /// Declares and allocates the parameters; they are zero until initialised or loaded. The config must be
  /// resolved.
  Transformer(Context& c, const ModelConfig& model, const RoutingConfig& routing, bool gradients);

  /// For inference, of a model some of whose products have weights of few bits: put_packed() of parameters()
  /// gives them; or that transforms what it computes as it runs. UserError: groups that do not divide the
  /// rows.
  Transformer(Context& c, const ModelConfig& model, const RoutingConfig& routing,
              const Quantization& quantization);

  const ModelConfig& config() const { return model_; }
  const RoutingConfig& routing() const { return routing_; }
  /// Null: every weight is a number of its own, nothing is transformed, and keys and values were to be none
  /// of few bits.
  const Quantization* quantization() const { return quantization_ ? &*quantization_ : nullptr; }
  ParameterSet& parameters() { return parameters_; }
  const ParameterSet& parameters() const { return parameters_; }
  std::vector<std::int64_t> routed_layers() const;
  std::vector<std::int64_t> expert_layers() const;

  /// Bits of the keys and values in this model's caches: its quantization's, or 16, as they are computed.
  /// Attention without a cache reads what one would hold, so that both compute the same model.
  int kv_bits() const { return kv_bits_; }
  /// UserError: other bits than 4, 8 and 16.
  void set_kv_bits(int bits);
  /// What a layer's keys lose before they become codes (kernels/cache_codes.h), stat [G, d]; undefined: the
  /// quantization has no key means. Zeros until they are set.
  Tensor key_means(std::int64_t layer) const;
  /// `means` [G, d]. UserError: they are not finite. InternalError: another size, or a quantization without.
  void set_key_means(Context& c, std::int64_t layer, std::span<const float> means);

  void set_recompute(Recompute r) { recompute_ = r; }
  void initialise(Context& c, std::uint64_t seed) { parameters_.initialise(c, seed); }

  /// The stack of blocks and the final norm. UserError: a tape records, and weights, or keys and values, are
  /// of few bits.
  ForwardResult forward(Context& c, const Batch& batch, const SelectionRule& rule,
                        const StreamObserver& observe = {}) const;
  /// The same in steps, for those who change the model between them: the stream [N, D] before the first
  /// block, and that after block `layer` from that before it; what the block decided is added to `decided`.
  /// InternalError: a tape records, or the batch has a cache.
  Tensor embed(Context& c, const Batch& batch) const;
  Tensor run_block(Context& c, std::int64_t layer, const Tensor& stream, const Batch& batch,
                   const SelectionRule& rule, ForwardResult& decided, const ProductObserver& observe = {},
                   const KeyObserver& keys = {}) const;
  /// The LM head: hidden [N, D] -> [N, V].
  Tensor logits(Context& c, const Tensor& hidden) const;
  /// Cross-entropy of every row, in nats [N], and, while a tape records, the gradient of its mean times
  /// `weight`.
  Tensor cross_entropy(Context& c, const Tensor& hidden, const Tensor& targets, double weight) const;
  /// The training objective: cross-entropy + aux_weight * BCE(router) + BCE(predictor), of routed blocks and
  /// of experts that choose, + balance_weight * balance + z_weight * z, where tokens choose; each a mean over
  /// rows or sequences (over its choices, and over its layers), times `weight`. Recorded on the tape; returns
  /// what it was made of.
  LossSums objective(Context& c, const Batch& batch, const ForwardResult& result, double weight) const;
  /// The same without waiting for the device; into `sums` of loss_slots() elements.
  DeviceLosses record_objective(Context& c, const Batch& batch, const ForwardResult& result, double weight,
                                const Tensor& sums) const;
  LossLayers loss_layers() const;
  /// 1 + 2 L + 2 X
  std::int64_t loss_slots() const { return 1 + 2 * (loss_layers().routed + loss_layers().experts); }

 private:
  struct Rows;    // the rows that a block works on
  struct Stream;  // the residual stream between blocks
  struct Slots;   // of experts

  Rows rows_of(Context& c, const Batch& batch, const SelectionRule& rule) const;
  Stream block(Context& c, std::int64_t layer, const Stream& stream, const Rows& rows,
               const SelectionRule& rule, ForwardResult& result) const;
  Stream dense_block(Context& c, std::int64_t layer, const Stream& stream, const Rows& rows,
                     ForwardResult& result) const;
  Stream routed_block(Context& c, std::int64_t layer, const Stream& stream, const Rows& rows,
                      const SelectionRule& rule, ForwardResult& result) const;
  Tensor attend(Context& c, std::int64_t layer, Tensor qkv, const Rows& rows, const Tensor& base) const;
  Tensor attention_of(Context& c, std::int64_t layer, const Tensor& x, const Rows& rows,
                      const Tensor& base) const;
  Tensor add_mlp(Context& c, std::int64_t layer, const Tensor& h, const Rows& rows) const;
  Tensor add_mlp_after(Context& c, std::int64_t layer, const Tensor& x, const Tensor& a,
                       const Rows& rows) const;
  std::vector<Tensor> experts_after(Context& c, const Tensor& x, const Tensor& a, const Rows& rows,
                                    ExpertLayer& experts) const;
  ExpertLayer route_to_experts(Context& c, const Tensor& x, std::int64_t layer, const Causal* rule) const;
  ops::Dispatch dispatch(Context& c, const ExpertLayer& routed, const Tensor& weights,
                         const Rows& rows) const;
  std::vector<Tensor ExpertLayer::*> read_by_losses() const;
  std::shared_ptr<ExpertLayer> begin_experts(std::int64_t layer) const;
  void keep_experts(ExpertLayer* experts, const std::vector<Tensor>& outputs, std::size_t first,
                    ForwardResult& result) const;
  void record_expert_losses(Context& c, const ForwardResult& result, double weight, const Tensor& sums,
                            std::int64_t rows) const;
  Tensor predict(Context& c, std::int64_t layer, const Tensor& x) const;
  Tensor predict_experts(Context& c, std::int64_t layer, const Tensor& x) const;
  std::vector<Tensor> body(Context& c, const BlockFunction& f, const std::vector<Tensor>& inputs) const;
  const Tensor& weight(std::int64_t layer, const char* name) const;
  ops::Weight product(Context& c, std::int64_t layer, const char* name, const Rows& rows,
                      const Slots* slots = nullptr) const;
  ops::InputTransform input_of(const std::string& parameter) const;

  ModelConfig model_;
  RoutingConfig routing_;
  std::optional<Quantization> quantization_;
  ops::Hadamard down_, heads_, queries_keys_;  // undefined: none
  int kv_bits_ = 16;
  Tensor key_means_;  // stat [depth, G*d]; undefined: none
  Recompute recompute_ = Recompute::None;
  ParameterSet parameters_;
};

}  // namespace fathom
