#include "src/model/transformer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/model/blocks.h"
#include "src/ops/attention.h"
#include "src/ops/hadamard.h"
#include "src/ops/linear.h"
#include "src/ops/loss.h"
#include "src/ops/mlp.h"
#include "src/ops/norm.h"
#include "src/ops/norm_linear.h"

namespace fathom {

std::string layer_name(std::int64_t layer, const char* name) {
  return fmt::format("model.layers.{}.{}", layer, name);
}

namespace {

void declare_block(ParameterSet& p, const ModelConfig& m, const RoutingConfig& r, std::int64_t layer) {
  const std::int64_t d = m.head_dim();
  const Init ones{Init::Kind::Ones, 0};
  const Init normal{Init::Kind::Normal, 0.02};
  // The residual stream sums 2 * depth projections: each starts smaller, so that the sum does not grow with
  // depth (Radford et al. 2019, section 2.3).
  const Init residual{Init::Kind::Normal, 0.02 / std::sqrt(2.0 * static_cast<double>(m.depth))};
  const auto matrix = [&](const char* name, std::int64_t out, std::int64_t in, const Init& init) {
    p.declare({layer_name(layer, name), Shape{out, in}, ParameterGroup::Decayed, init});
  };
  const auto vector = [&](const char* name, std::int64_t n, const Init& init) {
    p.declare({layer_name(layer, name), Shape{n}, ParameterGroup::Undecayed, init});
  };
  vector("input_layernorm.weight", m.width, ones);
  matrix("self_attn.qkv_proj.weight", (m.heads + 2 * m.kv_heads) * d, m.width, normal);
  matrix("self_attn.o_proj.weight", m.width, m.heads * d, residual);
  if (m.qk_norm) {
    vector("self_attn.q_norm.weight", d, ones);
    vector("self_attn.k_norm.weight", d, ones);
  }
  vector("post_attention_layernorm.weight", m.width, ones);
  if (r.has_experts()) {
    const auto product = [&](const char* name, const Shape& shape, ParameterGroup group, const Init& init) {
      p.declare({layer_name(layer, name), shape, group, init, true});
    };
    const std::int64_t e = r.experts.count;
    product("mlp.router.weight", {e + r.experts.noop, m.width}, ParameterGroup::Undecayed, normal);
    product("mlp.experts.gate_up_proj.weight", {e, 2 * m.ffn_hidden, m.width}, ParameterGroup::Decayed,
            normal);
    product("mlp.experts.down_proj.weight", {e, m.width, m.ffn_hidden}, ParameterGroup::Decayed, residual);
    if (r.experts_choose() && r.has_predictor()) {
      const std::int64_t hidden = r.causal.predictor_hidden, choices = e + r.experts.noop;
      product("mlp.router_predictor.0.weight", {hidden, m.width}, ParameterGroup::Predictor, normal);
      product("mlp.router_predictor.2.weight", {choices, hidden}, ParameterGroup::Predictor, normal);
      const Init zeros{Init::Kind::Zeros, 0};
      p.declare(
          {layer_name(layer, "mlp.router_predictor.0.bias"), {hidden}, ParameterGroup::Predictor, zeros});
      p.declare(
          {layer_name(layer, "mlp.router_predictor.2.bias"), {choices}, ParameterGroup::Predictor, zeros});
    }
  } else {
    matrix("mlp.gate_up_proj.weight", 2 * m.ffn_hidden, m.width, normal);
    matrix("mlp.down_proj.weight", m.width, m.ffn_hidden, residual);
  }
  if (!r.routes(layer)) return;
  // Small and random, never zero: equal scores would be all ties, and a zero raw gate lets no gradient
  // through.
  p.declare({layer_name(layer, "router.weight"), Shape{1, m.width}, ParameterGroup::Undecayed, normal});
  if (!r.has_predictor()) return;
  const auto predictor = [&](const char* name, const Shape& shape, const Init& init) {
    p.declare({layer_name(layer, name), shape, ParameterGroup::Predictor, init});
  };
  const std::int64_t hidden = r.causal.predictor_hidden;
  predictor("router_predictor.0.weight", {hidden, m.width}, normal);
  predictor("router_predictor.0.bias", {hidden}, {Init::Kind::Zeros, 0});
  predictor("router_predictor.2.weight", {1, hidden}, normal);
  predictor("router_predictor.2.bias", {1}, {Init::Kind::Zeros, 0});
}

constexpr const char* kEmbedding = "model.embed_tokens.weight";
constexpr const char* kFinalNorm = "model.norm.weight";
constexpr const char* kHead = "lm_head.weight";

}  // namespace

HostBatch make_host_batch(std::int64_t batch, std::int64_t seq, std::vector<std::int32_t> tokens,
                          std::vector<std::int32_t> targets, const std::vector<std::int32_t>& documents) {
  const std::int64_t rows = batch * seq;
  HostBatch b;
  b.batch = batch;
  b.seq = seq;
  b.tokens = std::move(tokens);
  b.targets = std::move(targets);
  b.positions.resize(static_cast<std::size_t>(rows));
  b.documents.resize(static_cast<std::size_t>(rows));
  b.document_mask = !documents.empty();
  std::int32_t document = 0;
  for (std::int64_t i = 0; i < rows; ++i) {
    const auto at = static_cast<std::size_t>(i);
    b.positions[at] = static_cast<std::int32_t>(i % seq);
    const bool starts = i > 0 && (i % seq == 0 || (b.document_mask && documents[at] != documents[at - 1]));
    document += starts ? 1 : 0;
    b.documents[at] = document;
  }
  return b;
}

Batch upload(Context& c, const HostBatch& host) {
  const auto room = [&] { return c.empty({host.batch * host.seq}, DType::I32, MemoryTag::Data); };
  Batch b;
  b.batch = host.batch;
  b.seq = host.seq;
  b.tokens = room();
  if (!host.targets.empty()) b.targets = room();
  b.positions = room();
  b.documents = room();
  b.document_mask = host.document_mask;
  upload_over(c, host, b);
  return b;
}

void upload_over(Context& c, const HostBatch& host, const Batch& batch) {
  Backend& backend = c.backend();
  from_host(backend, batch.tokens, host.tokens);
  if (batch.targets.defined()) from_host(backend, batch.targets, host.targets);
  from_host(backend, batch.positions, host.positions);
  from_host(backend, batch.documents, host.documents);
}

Batch make_batch(Context& c, std::int64_t batch, std::int64_t seq, const std::vector<std::int32_t>& tokens,
                 const std::vector<std::int32_t>& targets, const std::vector<std::int32_t>& documents) {
  return upload(c, make_host_batch(batch, seq, tokens, targets, documents));
}

ParameterSet declare_parameters(const ModelConfig& model, const RoutingConfig& routing) {
  ParameterSet p;
  const Init normal{Init::Kind::Normal, 0.02};
  const Shape table{model.vocab_size, model.width};
  p.declare({kEmbedding, table, ParameterGroup::Decayed, normal});
  for (std::int64_t layer = 0; layer < model.depth; ++layer) declare_block(p, model, routing, layer);
  p.declare({kFinalNorm, {model.width}, ParameterGroup::Undecayed, {Init::Kind::Ones, 0}});
  if (!model.tie_embeddings) p.declare({kHead, table, ParameterGroup::Decayed, normal});
  return p;
}

Transformer::Transformer(Context& c, const ModelConfig& model, const RoutingConfig& routing, bool gradients)
    : model_(model), routing_(routing), parameters_(declare_parameters(model, routing)) {
  parameters_.allocate(c, gradients);
}

Transformer::Transformer(Context& c, const ModelConfig& model, const RoutingConfig& routing,
                         const Quantization& quantization)
    : model_(model),
      routing_(routing),
      quantization_(quantization),
      parameters_(declare_parameters(model, routing)) {
  set_kv_bits(quantization.kv);
  for (const ParameterSpec& spec : parameters_.specs()) {
    if (!quantization.holds(spec)) continue;
    quantization.format(spec);
    parameters_.declare_packed(spec.name);
  }
  parameters_.allocate(c, false);
  const OnlineHadamards& online = quantization.online;
  if (online.down) down_ = {c, model.ffn_hidden};
  if (online.heads) heads_ = {c, model.heads, model.head_dim()};
  if (online.queries_keys) queries_keys_ = {c, model.head_dim()};
  if (quantization.key_means) {
    key_means_ = c.empty_stat({model.depth, model.kv_heads * model.head_dim()});
    c.backend().fill(key_means_, 0.0);
  }
}

void Transformer::set_kv_bits(int bits) {
  if (bits != 16 && !is_cache_of_codes(bits))
    throw UserError(fmt::format("Keys and values of {} bits are not supported.", bits), "Choose 4, 8 or 16.");
  kv_bits_ = bits;
}

Tensor Transformer::key_means(std::int64_t layer) const {
  return key_means_.defined() ? key_means_.rows(layer, layer + 1) : Tensor();
}

void Transformer::set_key_means(Context& c, std::int64_t layer, std::span<const float> means) {
  const Tensor to = key_means(layer);
  if (!to.defined() || to.size() != std::ssize(means))
    throw InternalError(fmt::format("[key_means] {} numbers for layer {}", means.size(), layer));
  if (!std::all_of(means.begin(), means.end(), [](float x) { return std::isfinite(x); }))
    throw UserError(fmt::format("The mean of layer {}'s keys is not finite.", layer),
                    "Look for weights that are not finite, or calibrate on other text.");
  from_doubles(c.backend(), to, {means.begin(), means.end()});
}

std::vector<std::int64_t> Transformer::routed_layers() const {
  std::vector<std::int64_t> layers;
  for (std::int64_t i = 0; i < model_.depth; ++i) {
    if (routing_.routes(i)) layers.push_back(i);
  }
  return layers;
}

std::vector<std::int64_t> Transformer::expert_layers() const {
  std::vector<std::int64_t> layers(routing_.has_experts() ? static_cast<std::size_t>(model_.depth) : 0);
  std::iota(layers.begin(), layers.end(), std::int64_t{0});
  return layers;
}

LossLayers Transformer::loss_layers() const {
  return {static_cast<std::int64_t>(routed_layers().size()),
          static_cast<std::int64_t>(expert_layers().size()), routing_.tokens_choose()};
}

const Tensor& Transformer::weight(std::int64_t layer, const char* name) const {
  return parameters_.get(layer_name(layer, name));
}

Transformer::Rows Transformer::rows_of(Context& c, const Batch& batch, const SelectionRule& rule) const {
  Rows rows{batch.batch, batch.seq, batch.positions, batch.documents, batch.document_mask, {}, {}};
  if (batch.document_mask) {
    rows.first_key = c.empty({batch.batch * batch.seq}, DType::I32);
    c.backend().first_keys(rows.first_key, batch.documents, batch.batch, batch.seq);
  }
  if (const auto* causal = std::get_if<Causal>(&rule)) rows.causal = *causal;
  rows.cache = batch.cache;
  if (rows.cache != nullptr &&
      (!rows.causal || batch.batch != 1 || batch.document_mask || c.tape() != nullptr)) {
    throw InternalError("[forward] a cache goes with one batch of rows, a causal rule and no tape");
  }
  return rows;
}

Transformer::Stream Transformer::block(Context& c, std::int64_t layer, const Stream& stream, const Rows& rows,
                                       const SelectionRule& rule, ForwardResult& result) const {
  const LayerScope scope(c, fmt::format("layer {}", layer));
  return routing_.routes(layer) ? routed_block(c, layer, stream, rows, rule, result)
                                : dense_block(c, layer, stream, rows, result);
}

Tensor Transformer::embed(Context& c, const Batch& batch) const {
  return ops::embedding(c, parameters_.get(kEmbedding), batch.tokens);
}

Tensor Transformer::run_block(Context& c, std::int64_t layer, const Tensor& stream, const Batch& batch,
                              const SelectionRule& rule, ForwardResult& decided,
                              const ProductObserver& observe, const KeyObserver& keys) const {
  if (c.tape() != nullptr || batch.cache != nullptr)
    throw InternalError("[run_block] a block alone goes with no tape and no cache");
  Rows rows = rows_of(c, batch, rule);
  if (observe) rows.observe = &observe;
  if (keys) rows.observe_keys = &keys;
  const Stream out = block(c, layer, {stream, {}}, rows, rule, decided);
  return out.delta.defined() ? ops::add(c, out.x, out.delta) : out.x;
}

ForwardResult Transformer::forward(Context& c, const Batch& batch, const SelectionRule& rule,
                                   const StreamObserver& observe) const {
  if ((quantization_ || kv_bits_ < 16) && c.tape() != nullptr) {
    const bool packed = quantization_ && quantization_->has_packed_weights();
    throw UserError(
        packed ? fmt::format("Weights of {} bits have no gradients: such a model cannot be trained.",
                             quantization_->bits)
        : kv_bits_ < 16
            ? fmt::format("Keys and values of {} bits have no gradients: such a model cannot be trained.",
                          kv_bits_)
            : "A model that transforms what it computes as it runs cannot be trained.",
        "Train the model that it was made from, and quantize that again.");
  }
  const Rows rows = rows_of(c, batch, rule);
  ForwardResult result;
  Stream stream{embed(c, batch), {}};
  const auto show = [&](std::int64_t blocks) {
    if (!observe) return;
    const NoGrad no_grad(c);
    observe(blocks, stream.delta.defined() ? ops::add(c, stream.x, stream.delta) : stream.x);
  };
  show(0);
  for (std::int64_t layer = 0; layer < model_.depth; ++layer) {
    stream = block(c, layer, stream, rows, rule, result);
    show(layer + 1);
  }
  const Tensor& norm = parameters_.get(kFinalNorm);
  result.hidden = stream.delta.defined()
                      ? ops::add_rms_norm(c, stream.x, stream.delta, norm, model_.norm_eps).second
                      : ops::rms_norm(c, stream.x, norm, model_.norm_eps);
  return result;
}

// Queries and keys may be transformed behind RoPE, both alike: then the cache holds them so.
// a = W_o attention(rope(qkv)), or base + a where base is defined
Tensor Transformer::attend(Context& c, std::int64_t layer, Tensor qkv, const Rows& rows,
                           const Tensor& base) const {
  const bool qk_norm = model_.qk_norm;
  qkv = ops::rope(c, std::move(qkv), rows.positions,
                  qk_norm ? weight(layer, "self_attn.q_norm.weight") : Tensor(),
                  qk_norm ? weight(layer, "self_attn.k_norm.weight") : Tensor(),
                  {model_.heads, model_.kv_heads, model_.rope_theta, model_.norm_eps, model_.rope_scaling});
  if (queries_keys_.defined())
    qkv = ops::hadamard_heads(c, std::move(qkv), model_.heads + model_.kv_heads, queries_keys_);
  if (rows.observe_keys != nullptr) (*rows.observe_keys)(qkv);
  if (rows.cache == nullptr && kv_bits_ < 16) {
    qkv =
        ops::cache_round_trip(c, std::move(qkv), key_means(layer), {model_.heads, model_.kv_heads, kv_bits_});
  }
  const Tensor mixed =
      rows.cache != nullptr
          ? rows.cache->attend(c, layer, qkv, rows.kept)
          : ops::attention(c, qkv, rows.first_key, {rows.batch, rows.seq, model_.heads, model_.kv_heads});
  const FlopItem item(c, "attention_proj");
  const ops::Weight w = product(c, layer, "self_attn.o_proj.weight", rows);
  return base.defined() ? ops::linear_add(c, base, mixed, w) : ops::linear(c, mixed, w);
}

// a = W_o attention(rope(W_qkv norm(x))), or base + a where base is defined
Tensor Transformer::attention_of(Context& c, std::int64_t layer, const Tensor& x, const Rows& rows,
                                 const Tensor& base) const {
  Tensor qkv;
  {
    const FlopItem item(c, "attention_proj");
    qkv = ops::rms_norm_linear(c, x, weight(layer, "input_layernorm.weight"),
                               product(c, layer, "self_attn.qkv_proj.weight", rows), model_.norm_eps);
  }
  return attend(c, layer, std::move(qkv), rows, base);
}

// h + m, m = W_down (silu(W_gate norm(h)) * W_up norm(h)).
Tensor Transformer::add_mlp(Context& c, std::int64_t layer, const Tensor& h, const Rows& rows) const {
  const FlopItem item(c, "mlp");
  Tensor gate_up = ops::rms_norm_linear(c, h, weight(layer, "post_attention_layernorm.weight"),
                                        product(c, layer, "mlp.gate_up_proj.weight", rows), model_.norm_eps);
  return ops::swiglu_linear_add(c, h, std::move(gate_up), product(c, layer, "mlp.down_proj.weight", rows));
}

// a + m, m of h = x + a: what a routed block adds to the stream.
Tensor Transformer::add_mlp_after(Context& c, std::int64_t layer, const Tensor& x, const Tensor& a,
                                  const Rows& rows) const {
  const FlopItem item(c, "mlp");
  Tensor gate_up =
      ops::add_rms_norm_linear(c, x, a, weight(layer, "post_attention_layernorm.weight"),
                               product(c, layer, "mlp.gate_up_proj.weight", rows), model_.norm_eps)
          .second;
  return ops::swiglu_linear_add(c, a, std::move(gate_up), product(c, layer, "mlp.down_proj.weight", rows));
}

std::vector<Tensor> Transformer::body(Context& c, const BlockFunction& f,
                                      const std::vector<Tensor>& inputs) const {
  return recompute_ == Recompute::Block ? recompute(c, f, inputs) : f(c, inputs);
}

Transformer::Stream Transformer::dense_block(Context& c, std::int64_t layer, const Stream& stream,
                                             const Rows& all_rows, ForwardResult& result) const {
  Rows rows = all_rows;
  rows.experts = begin_experts(layer);
  const auto f = [this, layer, rows](Context& ctx, const std::vector<Tensor>& in) -> std::vector<Tensor> {
    // Experts add up what they make of rows by themselves: behind their norm the branches are apart.
    const bool apart = rows.experts != nullptr;
    Tensor h = in[0];
    Tensor attended;  // h + a, or a where they are apart
    if (in[1].defined()) {
      Tensor qkv;
      {
        const FlopItem item(ctx, "attention_proj");
        std::tie(h, qkv) =
            ops::add_rms_norm_linear(ctx, in[0], in[1], weight(layer, "input_layernorm.weight"),
                                     product(ctx, layer, "self_attn.qkv_proj.weight", rows), model_.norm_eps);
      }
      attended = attend(ctx, layer, std::move(qkv), rows, {});  // only experts leave a delta
    } else {
      attended = attention_of(ctx, layer, h, rows, apart ? Tensor() : h);
    }
    if (apart) return experts_after(ctx, h, attended, rows, *rows.experts);
    return {add_mlp(ctx, layer, attended, rows)};
  };
  std::vector<Tensor> out = body(c, f, {stream.x, stream.delta});
  keep_experts(rows.experts.get(), out, 2, result);
  return {out[0], out.size() > 1 ? out[1] : Tensor()};
}

Tensor Transformer::logits(Context& c, const Tensor& hidden) const {
  const FlopItem item(c, "head");
  return ops::linear(c, hidden, parameters_.get(model_.tie_embeddings ? kEmbedding : kHead));
}

Tensor Transformer::cross_entropy(Context& c, const Tensor& hidden, const Tensor& targets,
                                  double weight) const {
  const double rows = static_cast<double>(hidden.dim(0));
  return ops::linear_cross_entropy(c, hidden, parameters_.get(model_.tie_embeddings ? kEmbedding : kHead),
                                   targets, {.gradient_scale = weight / rows});
}

DeviceLosses Transformer::record_objective(Context& c, const Batch& batch, const ForwardResult& result,
                                           double weight, const Tensor& sums) const {
  DeviceLosses losses{sums, loss_layers(), batch.batch * batch.seq};
  Backend& backend = c.backend();
  if (sums.size() > 1) backend.fill(sums, 0.0);
  backend.sum(sums.rows(0, 1), cross_entropy(c, result.hidden, batch.targets, weight));
  const auto layers = static_cast<std::int64_t>(result.routing.size());
  const double scale = weight / static_cast<double>(losses.rows * layers);
  for (std::int64_t i = 0; i < layers; ++i) {
    const RoutedLayer& routed = result.routing[static_cast<std::size_t>(i)];
    const auto add = [&](std::int64_t slot, const Tensor& logits, double gradient_scale) {
      const ops::LossOptions options{.gradient_scale = gradient_scale};
      backend.sum(sums.rows(slot, slot + 1), ops::membership_bce(c, logits, routed.indices, options));
    };
    if (routing_.has_aux_loss()) add(1 + i, routed.scores, scale * routing_.causal.aux_weight);
    if (routed.predicted.defined()) add(1 + layers + i, routed.predicted, scale);
  }
  record_expert_losses(c, result, weight, sums, losses.rows);
  return losses;
}

LossSums Transformer::objective(Context& c, const Batch& batch, const ForwardResult& result,
                                double weight) const {
  const Tensor sums = c.empty_stat({loss_slots()});
  return read_losses(c, record_objective(c, batch, result, weight, sums));
}

LossSums loss_sums_of(const double* sums, const LossLayers& layers, std::int64_t rows) {
  LossSums s;
  s.rows = rows;
  s.cross_entropy = sums[0];
  const auto mean = [](const double* first, std::int64_t n) {
    double sum = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += first[i] / static_cast<double>(n);
    return sum;
  };
  s.aux = mean(sums + 1, layers.routed);
  s.predictor = mean(sums + 1 + layers.routed, layers.routed);
  const double* of_experts = sums + 1 + 2 * layers.routed;
  (layers.tokens_choose ? s.balance : s.expert_aux) = mean(of_experts, layers.experts);
  (layers.tokens_choose ? s.z : s.expert_predictor) = mean(of_experts + layers.experts, layers.experts);
  return s;
}

LossSums read_losses(Context& c, const DeviceLosses& losses) {
  const std::vector<double> values = to_doubles(c.backend(), losses.sums);
  return loss_sums_of(values.data(), losses.layers, losses.rows);
}

}  // namespace fathom
