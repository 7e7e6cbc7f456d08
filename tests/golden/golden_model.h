// The models of the golden files: their shapes, parameters and batches, and the measure of agreement.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "src/autograd/tape.h"
#include "src/model/transformer.h"
#include "tests/golden/golden_file.h"

namespace fathom::golden {

inline constexpr std::int64_t kBatch = 3;
inline constexpr std::int64_t kSeq = 20;
inline constexpr const char* kModels[] = {
    "dense",          "dense_gqa",         "dense_tied",           "mod_raw_aux",      "mod_sigmoid_aux",
    "mod_tanh_aux",   "mod_raw_predictor", "mod_sigmoid_both",     "mod_raw_both_gqa", "moe",
    "moe_few",        "moe_many",          "mode_integrated",      "mode_staged",      "mode_staged_raw",
    "moe_aux",        "moe_predictor",     "mode_integrated_both", "token_top1",       "token_top2",
    "token_dropless", "token_integrated",  "token_staged",         "token_mixtral"};

/// The largest error of a tensor, relative to its largest element.
inline double relative_error(const std::vector<double>& ours, const std::vector<double>& theirs) {
  if (ours.size() != theirs.size()) return INFINITY;
  double error = 0;
  double scale = 0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    // Written so that a NaN is an infinite error.
    if (!(std::abs(ours[i] - theirs[i]) < INFINITY)) return INFINITY;
    error = std::max(error, std::abs(ours[i] - theirs[i]));
    scale = std::max(scale, std::abs(theirs[i]));
  }
  return scale > 0 ? error / scale : error;
}

inline ModelConfig model_config(const GoldenFile& file, std::int64_t seq) {
  ModelConfig m;
  m.vocab_size = 41;
  m.width = 32;
  m.depth = 4;
  m.heads = 4;
  m.kv_heads = static_cast<std::int64_t>(file.attribute("kv_heads"));
  m.ffn_hidden = 24;
  m.max_seq_len = seq;
  m.tie_embeddings = file.attribute("tied") != 0;
  return m;
}

inline RoutingConfig routing_config(const GoldenFile& file) {
  RoutingConfig r;
  if (file.has_attribute("experts")) {
    r.kind = static_cast<RoutingKind>(file.attribute("kind"));
    r.experts.count = static_cast<std::int64_t>(file.attribute("experts"));
    r.experts.noop = static_cast<std::int64_t>(file.attribute("noop"));
    r.experts.capacity_factor = file.attribute("capacity_factor");
    if (file.has_attribute("top_k")) {
      r.experts.choice = ExpertsChoose::Token;
      r.experts.top_k = static_cast<std::int64_t>(file.attribute("top_k"));
      r.experts.balance_weight = file.attribute("balance_weight");
      r.experts.z_weight = file.attribute("z_weight");
    }
  }
  const bool routed = file.attribute("routed") != 0;
  const bool aux = file.attribute("aux_weight") > 0;
  const bool predictor = file.attribute("predictor") != 0;
  r.causal.method = CausalMethod::None;
  if (!routed && !file.has_attribute("foretold")) return r;
  if (!file.has_attribute("experts")) r.kind = RoutingKind::Mod;
  r.every = 2;
  r.first = 1;
  r.capacity = file.attribute("capacity");
  r.gate = std::vector<Gate>{Gate::Raw, Gate::Sigmoid, Gate::Tanh}.at(
      static_cast<std::size_t>(file.attribute("gate")));
  r.causal.method = aux && predictor ? CausalMethod::Both
                    : aux            ? CausalMethod::Aux
                    : predictor      ? CausalMethod::Predictor
                                     : CausalMethod::None;
  r.causal.aux_weight = file.attribute("aux_weight");
  r.causal.predictor_hidden = 8;
  return r;
}

/// Loads the shared parameters; with fewer key/value heads, the first ones of the keys and of the values;
/// with fewer no-ops, the first rows of the experts' router.
inline void load_parameters(Context& c, Transformer& model) {
  const GoldenFile shared("shared.h5"), experts("shared_experts.h5");
  const ModelConfig& m = model.config();
  for (const ParameterSpec& spec : model.parameters().specs()) {
    const std::string path = "parameter/" + spec.name;
    std::vector<double> values = (experts.has(path) ? experts : shared).doubles(path);
    if (spec.name.find("mlp.router") != std::string::npos) {
      values.resize(static_cast<std::size_t>(spec.shape.size()));
    }
    if (spec.name.find("qkv_proj") != std::string::npos) {
      const auto rows = [&](std::int64_t begin, std::int64_t heads, std::vector<double>& out) {
        const auto from = values.begin() + begin * m.head_dim() * m.width;
        out.insert(out.end(), from, from + heads * m.head_dim() * m.width);
      };
      std::vector<double> taken;
      rows(0, m.heads, taken);
      rows(m.heads, m.kv_heads, taken);
      rows(2 * m.heads, m.kv_heads, taken);
      values = std::move(taken);
    }
    from_doubles(c.backend(), model.parameters().get(spec.name), values);
  }
}

}  // namespace fathom::golden
