// Contradictions between keys; each key's own range is in keys.cpp.
#include <cctype>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/names.h"
#include "src/config/parse.h"
#include "src/config/scalar.h"

namespace fathom {
namespace {

// Says where a contradiction stands before it says what it is.
class Checker {
 public:
  explicit Checker(const Origins& origins) : origins_(origins) {}

  void require(bool holds, std::initializer_list<std::string_view> keys, const std::string& problem,
               const std::string& hint) const {
    if (holds) return;
    std::string where;
    for (const std::string_view key : keys) {
      const auto found = origins_.find(key);
      if (found == origins_.end() || where.find(found->second) != std::string::npos) continue;
      where += (where.empty() ? "" : ", ") + found->second;
    }
    throw UsageError(where.empty() ? problem : where + ": " + problem, hint);
  }

 private:
  const Origins& origins_;
};

void check_model(const Config& c, const Checker& check) {
  const ModelConfig& m = c.model;
  check.require(
      m.own_head_dim > 0 || m.width % m.heads == 0, {"model.width", "model.heads"},
      fmt::format("model.width is {} and model.heads is {}, but the heads must divide the width.", m.width,
                  m.heads),
      fmt::format("With {} heads the nearest widths are {} and {}; or give model.head_dim.", m.heads,
                  std::max(m.width / m.heads, std::int64_t{1}) * m.heads, (m.width / m.heads + 1) * m.heads));
  if (m.own_head_dim > 0) {
    check.require(
        m.own_head_dim % 2 == 0, {"model.head_dim"},
        fmt::format("model.head_dim is {}, but RoPE rotates pairs, so it must be even.", m.own_head_dim),
        "Change model.head_dim.");
  } else {
    check.require(m.head_dim() % 2 == 0, {"model.width", "model.heads"},
                  fmt::format("model.width / model.heads is {}, but RoPE rotates pairs, so it must be even.",
                              m.head_dim()),
                  "Change model.heads or model.width, or give model.head_dim.");
  }
  check.require(
      m.kv_heads == 0 || m.heads % m.kv_heads == 0, {"model.heads", "model.kv_heads"},
      fmt::format("model.kv_heads is {}, but it must divide model.heads, which is {}.", m.kv_heads, m.heads),
      "Each key and value head serves the same number of query heads.");
  const RopeScaling& s = m.rope_scaling;
  check.require(
      s.kind != RopeScalingKind::Llama3 || s.high_freq_factor > s.low_freq_factor,
      {"model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor"},
      fmt::format("model.rope_scaling.high_freq_factor is {}, not above low_freq_factor, which is {}.",
                  print_number(s.high_freq_factor), print_number(s.low_freq_factor)),
      "Llama 3 has 1 and 4.");
  check.require(m.max_seq_len == 0 || c.train.seq_len <= m.max_seq_len,
                {"train.seq_len", "model.max_seq_len"},
                fmt::format("train.seq_len is {}, longer than model.max_seq_len, which is {}.",
                            c.train.seq_len, m.max_seq_len),
                "Raise model.max_seq_len, or leave it at 0 to follow train.seq_len.");
}

void check_routing(const Config& c, const Checker& check) {
  const RoutingConfig& r = c.routing;
  if (!r.routes_depth()) return;
  check.require(r.first < c.model.depth, {"routing.first", "model.depth"},
                fmt::format("routing.first is {}, but the {} blocks of the model are counted from 0, so no "
                            "block would be routed.",
                            r.first, c.model.depth),
                fmt::format("Set routing.first to at most {}, or routing.kind to none.", c.model.depth - 1));
}

void check_experts(const Config& c, const Checker& check) {
  if (!c.routing.has_experts()) return;
  const ExpertsConfig& e = c.routing.experts;
  const bool tokens = c.routing.tokens_choose();
  check.require(tokens || e.capacity_factor > 0, {"experts.capacity_factor"},
                "experts.capacity_factor is 0, but experts that choose (experts.choice: expert) need a "
                "number of tokens "
                "to choose.",
                "1 computes as many tokens as a dense MLP. Without a limit: experts.choice: token.");
  check.require(!tokens || e.top_k <= e.count, {"experts.top_k", "experts.count"},
                fmt::format("experts.top_k is {}, but there are only experts.count = {} experts to choose.",
                            e.top_k, e.count),
                "Lower experts.top_k.");
  const double most = static_cast<double>(e.count) / (tokens ? static_cast<double>(e.top_k) : 1.0);
  check.require(
      e.capacity_factor <= most, {"experts.capacity_factor", "experts.count"},
      fmt::format(
          "experts.capacity_factor is {}, but each of the experts.count = {} experts has room for all "
          "tokens from {} on.",
          print_number(e.capacity_factor), e.count, print_number(most)),
      fmt::format("Set it to at most {}; 1 is as many as there are if all experts take the same.",
                  print_number(most)));
  const bool integrated = c.routing.kind == RoutingKind::ModeIntegrated;
  check.require(
      !integrated || e.noop > 0, {"routing.kind", "experts.noop"},
      "routing.kind is mode_integrated, but experts.noop is 0, so no expert would do nothing.",
      fmt::format("Set experts.noop, to experts.count = {} for instance, or routing.kind to moe.", e.count));
  check.require(
      integrated || e.noop == 0, {"routing.kind", "experts.noop"},
      fmt::format("experts.noop is {}, but routing.kind is {}, which has no experts that do nothing.", e.noop,
                  name_of(c.routing.kind)),
      "Set routing.kind to mode_integrated, or experts.noop to 0.");
}

void check_batch(const Config& c, const Checker& check) {
  const TrainConfig& t = c.train;
  check.require(
      t.batch_tokens % t.seq_len == 0, {"train.batch_tokens", "train.seq_len"},
      fmt::format("train.batch_tokens is {}, but it must be a multiple of train.seq_len, which is {}.",
                  t.batch_tokens, t.seq_len),
      fmt::format("{} is one.", std::max<std::int64_t>(1, t.batch_tokens / t.seq_len) * t.seq_len));
  const std::int64_t sequences = t.batch_tokens / t.seq_len;
  check.require(
      t.micro_batch == 0 || sequences % t.micro_batch == 0,
      {"train.micro_batch", "train.batch_tokens", "train.seq_len"},
      fmt::format(
          "train.micro_batch is {}, but it must divide the {} sequences of a step (batch_tokens / seq_len).",
          t.micro_batch, sequences),
      "Choose a divisor, or 0 for all of them at once.");
}

void check_horizon(const Config& c, const Checker& check) {
  const TrainConfig& t = c.train;
  std::vector<std::string> given;
  if (t.target_flops) given.push_back("train.target_flops = " + print_number(*t.target_flops));
  if (t.tokens) given.push_back(fmt::format("train.tokens = {}", *t.tokens));
  if (t.steps) given.push_back(fmt::format("train.steps = {}", *t.steps));
  const std::string rule = "Give exactly one of train.target_flops, train.tokens and train.steps.";
  check.require(!given.empty(), {""}, "the config has no horizon, so it does not say how long to train.",
                rule);
  const std::string first = given.front().substr(0, given.front().find(' '));
  check.require(
      given.size() == 1, {"train.target_flops", "train.tokens", "train.steps"},
      fmt::format("the config has {} horizons: {}.", given.size(), fmt::join(given, ", ")),
      fmt::format("{} To override the file's, unset it with --set {}=null, for instance.", rule, first));
}

void check_schedule(const Config& c, const Checker& check) {
  const TrainConfig& t = c.train;
  check.require(
      t.schedule != Schedule::Wsd || t.warmup >= 1 || t.warmup + t.wsd_decay <= 1,
      {"train.warmup", "train.wsd_decay"},
      fmt::format(
          "train.warmup is {} and train.wsd_decay is {} of the steps, more than all of them together.",
          print_number(t.warmup), print_number(t.wsd_decay)),
      "Lower one of them.");
  check.require(t.eval_tokens >= t.seq_len || c.data.valid.empty(), {"train.eval_tokens", "train.seq_len"},
                fmt::format("train.eval_tokens is {}, less than one sequence of train.seq_len = {}.",
                            t.eval_tokens, t.seq_len),
                "Raise train.eval_tokens.");
}

void check_device(const Config& c, const Checker& check) {
  const std::string_view device = c.device;
  bool known = device == "cpu" || device == "cuda" || device == "auto";
  if (device.starts_with("cuda:") && device.size() > 5 && device.size() <= 8) {
    known = device.find_first_not_of("0123456789", 5) == std::string_view::npos;
  }
  check.require(known, {"device"},
                fmt::format("device is {}, but it must be cpu, cuda, cuda:N or auto.",
                            print_text(device.substr(0, 80))),
                "");
}

}  // namespace

void validate(const Config& config, const Origins& origins) {
  const Checker check(origins);
  check_device(config, check);
  check_model(config, check);
  check_routing(config, check);
  check_experts(config, check);
  check_batch(config, check);
  check_horizon(config, check);
  check_schedule(config, check);
}

std::vector<std::string> config_notes(const Config& c) {
  std::vector<std::string> notes;
  if (c.routing.needs_future()) {
    notes.emplace_back(
        "routing.causal.method is none: the model trains and is evaluated with top-k, but top-k needs the "
        "future, so it "
        "cannot generate or be served. Use aux, predictor or both for that.");
  }
  if (c.routing.routes_depth() && c.routing.selection == Selection::Stochastic) {
    notes.emplace_back(
        "routing.selection is stochastic, the paper's control: blocks compute tokens chosen by chance. "
        "val_topk is "
        "the loss under that choice, and nothing can foretell it for val_causal.");
  }
  if (c.routing.experts_choose() && c.routing.method() == CausalMethod::Aux) {
    notes.emplace_back(
        "routing.causal.method is aux, and experts choose: linear routers foretell poorly which tokens "
        "experts "
        "take (0.05 to 0.76 nats lost in val_causal, docs/results/isoflop); predictor loses 0.002 to 0.013.");
  }
  if (c.routing.has_aux_loss() && c.routing.causal.aux_weight == 0) {
    notes.emplace_back(
        "routing.causal.aux_weight is 0: nothing trains the routers to choose without the future.");
  }
  return notes;
}

}  // namespace fathom
