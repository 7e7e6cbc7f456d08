// The resolved configuration of a run: every key, its default, its unit. `fathom train CONFIG --print-config`
// shows it.
//
// Every key, its range and its meaning stand once more in keys.cpp, the table that drives reading, printing
// and the documentation. The FLOPs that a configuration costs are in src/flops.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/rope_scaling.h"

namespace fathom {

/// A Llama-style transformer. Every length is in tokens or elements.
struct ModelConfig {
  std::int64_t vocab_size = 0;    // V; 0: taken from the token store
  std::int64_t width = 256;       // D
  std::int64_t depth = 6;         // blocks
  std::int64_t heads = 4;         // H, query heads
  std::int64_t kv_heads = 0;      // G, key/value heads; 0: as many as heads
  std::int64_t own_head_dim = 0;  // d, elements of a head; 0: width / heads
  std::int64_t ffn_hidden = 0;    // F; 0: 8/3 of the width, rounded up to a multiple of 64
  std::int64_t max_seq_len = 0;   // 0: train.seq_len
  double rope_theta = 10000.0;
  RopeScaling rope_scaling = {};
  double norm_eps = 1e-5;
  bool qk_norm = false;
  bool tie_embeddings = false;

  std::int64_t head_dim() const { return own_head_dim > 0 ? own_head_dim : width / heads; }

  bool operator==(const ModelConfig&) const = default;
};

/// Mod, ModeStaged: blocks compute some of the tokens. Moe, ModeStaged, ModeIntegrated: every block's MLP is
/// one of experts; in ModeIntegrated some of the experts do nothing (no-ops).
enum class RoutingKind { None, Mod, Moe, ModeStaged, ModeIntegrated };
enum class Selection { TopK, Stochastic };
enum class Gate { Raw, Sigmoid, Tanh };
enum class CausalMethod { Auto, None, Aux, Predictor, Both };

struct CausalConfig {
  CausalMethod method = CausalMethod::Auto;  // resolved (src/config/resolve.h): aux or predictor
  double aux_weight = 0.01;                  // of the BCE on the router's own logits
  std::int64_t predictor_hidden = 0;         // 0: width / 4
  double threshold = 0.5;  // on sigmoid(logit): a token above it goes through the block, or to the expert

  bool operator==(const CausalConfig&) const = default;
};

enum class ExpertsChoose { Expert, Token };

/// The experts of each block's MLP. Expert choice (Zhou et al. 2022, arXiv 2202.09368): an expert takes the
/// tokens of each sequence that have the largest affinity for it. Token choice (Fedus et al. 2021, arXiv
/// 2101.03961): a token goes to the experts that it has the largest affinity for, while they have room.
struct ExpertsConfig {
  std::int64_t count = 8;  // E
  ExpertsChoose choice = ExpertsChoose::Expert;
  double capacity_factor =
      1.0;                 // room of an expert, 1: if all take the same; token: 0: no limit (expert_tokens)
  std::int64_t top_k = 2;  // token: experts that a token chooses
  std::int64_t noop = 0;   // choices besides the experts that compute nothing (mode_integrated)
  double balance_weight = 0.01;  // token: of the load-balancing loss
  double z_weight = 0.001;       // token: of the router's z-loss

  bool operator==(const ExpertsConfig&) const = default;
};

/// Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258), experts, and both.
struct RoutingConfig {
  RoutingKind kind = RoutingKind::None;
  std::int64_t every = 2;   // block i is routed when i >= first and (i - first) % every == 0
  std::int64_t first = 1;   // 0-based index of the first routed block
  double capacity = 0.125;  // C: K = max(1, floor(C * T)) tokens of each sequence
  Selection selection = Selection::TopK;
  Gate gate = Gate::Raw;
  CausalConfig causal;
  ExpertsConfig experts;

  /// Whether some blocks compute some tokens only.
  bool routes_depth() const { return kind == RoutingKind::Mod || kind == RoutingKind::ModeStaged; }
  bool routes(std::int64_t block) const {
    return routes_depth() && block >= first && (block - first) % every == 0;
  }
  bool has_experts() const {
    return kind == RoutingKind::Moe || kind == RoutingKind::ModeStaged || kind == RoutingKind::ModeIntegrated;
  }
  bool experts_choose() const { return has_experts() && experts.choice == ExpertsChoose::Expert; }
  bool tokens_choose() const { return has_experts() && experts.choice == ExpertsChoose::Token; }
  /// Whether a token's way depends, in training, on those that follow it.
  bool looks_ahead() const { return routes_depth() || experts_choose(); }
  /// The same, and no rule that does without them was trained.
  bool needs_future() const { return looks_ahead() && causal.method == CausalMethod::None; }
  /// causal.method, and what auto stands for. A linear router cannot tell which tokens its experts would take
  /// of a sequence, which is a matter of all choices' affinities; a predictor can (docs/results/isoflop).
  CausalMethod method() const {
    if (causal.method != CausalMethod::Auto) return causal.method;
    return experts_choose() ? CausalMethod::Predictor : CausalMethod::Aux;
  }
  /// Of whatever looks ahead: the routers of blocks, those of experts, or both.
  bool has_predictor() const {
    return looks_ahead() && (method() == CausalMethod::Predictor || method() == CausalMethod::Both);
  }
  bool has_aux_loss() const {
    return looks_ahead() && (method() == CausalMethod::Aux || method() == CausalMethod::Both);
  }

  bool operator==(const RoutingConfig&) const = default;
};

struct DataConfig {
  std::string train;           // token store
  std::string valid;           // token store; empty: no evaluation
  std::string tokenizer;       // SentencePiece model; not needed for a byte store
  bool document_mask = false;  // attention does not cross documents within a sequence

  bool operator==(const DataConfig&) const = default;
};

enum class Schedule { Cosine, Wsd, Constant };
enum class Recompute { None, Block };
enum class OnSpike { Stop, Skip, Warn };

struct TrainConfig {
  std::int64_t seq_len = 256;        // T, tokens
  std::int64_t batch_tokens = 2048;  // tokens an optimizer step
  std::int64_t micro_batch = 0;      // sequences a forward pass; 0: the whole batch
  double lr = 1e-3;
  Schedule schedule = Schedule::Cosine;
  double warmup = 0.02;       // below 1: share of the steps; 1 and above: steps
  double min_lr_ratio = 0.1;  // of lr, at the end of cosine and wsd
  double wsd_decay = 0.2;     // wsd: the share of the steps that decays
  double weight_decay = 0.1;
  std::vector<double> betas = {0.9, 0.95};
  double eps = 1e-8;
  double grad_clip = 1.0;  // global norm; 0: off
  // Exactly one horizon.
  std::optional<double> target_flops;  // training FLOPs
  std::optional<std::int64_t> tokens;
  std::optional<std::int64_t> steps;
  std::string precision = "fp32";
  std::string reduction = "fp32";  // of gradients among several ranks: what they are sent as
  Recompute recompute = Recompute::None;
  std::int64_t log_every = 10;           // steps
  std::int64_t eval_every = 0;           // steps; 0: at the end only
  std::int64_t eval_tokens = 65536;      // tokens of the fixed validation slice
  std::int64_t checkpoint_every = 1000;  // steps; 0: at the end only
  std::int64_t keep_checkpoints = 2;
  OnSpike on_spike = OnSpike::Stop;
  double rank_timeout = 120;  // seconds that one of several ranks may be silent
  double spike_factor = 3.0;  // a spike: loss above factor * (running mean) for a step; NaN always is one

  bool operator==(const TrainConfig&) const = default;
};

struct Config {
  std::uint64_t seed = 1;
  bool deterministic = false;
  bool invariant = false;
  std::string device = "auto";
  ModelConfig model;
  RoutingConfig routing;
  DataConfig data;
  TrainConfig train;

  std::int64_t micro_batch_sequences() const {
    return train.micro_batch > 0 ? train.micro_batch : train.batch_tokens / train.seq_len;
  }
  std::int64_t accumulation() const { return train.batch_tokens / train.seq_len / micro_batch_sequences(); }

  bool operator==(const Config&) const = default;
};

/// K of a routed block for a sequence of `seq_len` tokens: max(1, floor(C * T)).
std::int64_t kept_tokens(double capacity, std::int64_t seq_len);

/// Tokens of a sequence of `seq_len` that each expert has room for: max(1, floor(capacity_factor * k * T /
/// E)), at most T, where a token chooses k = top_k experts and, under expert choice, k = 1. Without a limit:
/// T.
std::int64_t expert_tokens(const ExpertsConfig& experts, std::int64_t seq_len);

}  // namespace fathom
