#include "tests/distributed/kinds.h"

#include <functional>

#include "src/config/resolve.h"

namespace fathom::testing {

std::vector<Kind> all_kinds() {
  std::vector<Kind> kinds;
  const auto add = [&](const char* name, const std::function<void(Config&)>& change) {
    Config c;
    c.model.vocab_size = 64;
    c.model.width = 16;
    c.model.depth = 3;
    c.model.heads = 2;
    c.model.ffn_hidden = 32;
    c.routing.capacity = 0.25;
    c.routing.causal.aux_weight = 0.3;
    c.routing.experts.count = 4;
    c.routing.experts.balance_weight = 0.2;
    c.routing.experts.z_weight = 0.1;
    c.train.seq_len = 16;
    c.train.batch_tokens = 128;
    c.train.steps = 100;
    c.train.precision = "fp32";
    c.train.on_spike = OnSpike::Warn;
    change(c);
    kinds.push_back({name, resolve(c)});
  };
  const auto mod = [](CausalMethod method) {
    return [method](Config& c) {
      c.routing.kind = RoutingKind::Mod;
      c.routing.causal.method = method;
    };
  };
  const auto experts = [](RoutingKind kind, ExpertsChoose choice, double capacity, CausalMethod method) {
    return [=](Config& c) {
      c.routing.kind = kind;
      c.routing.experts.choice = choice;
      c.routing.experts.capacity_factor = capacity;
      c.routing.experts.noop = kind == RoutingKind::ModeIntegrated ? 2 : 0;
      c.routing.causal.method = method;
    };
  };
  add("dense", [](Config&) {});
  add("dense_tied_qk_norm", [](Config& c) { c.model.tie_embeddings = c.model.qk_norm = true; });
  add("mod_none", mod(CausalMethod::None));
  add("mod_aux", mod(CausalMethod::Aux));
  add("mod_predictor", mod(CausalMethod::Predictor));
  add("mod_both", mod(CausalMethod::Both));
  add("stochastic", [](Config& c) {
    c.routing.kind = RoutingKind::Mod;
    c.routing.selection = Selection::Stochastic;
    c.routing.causal.method = CausalMethod::Predictor;
  });
  using Routing = RoutingKind;
  using Choose = ExpertsChoose;
  add("moe_experts_choose", experts(Routing::Moe, Choose::Expert, 1, CausalMethod::Both));
  add("moe_tokens_choose", experts(Routing::Moe, Choose::Token, 1, CausalMethod::Auto));
  add("moe_dropless", experts(Routing::Moe, Choose::Token, 0, CausalMethod::Auto));
  add("mode_staged_experts_choose", experts(Routing::ModeStaged, Choose::Expert, 1, CausalMethod::Both));
  add("mode_staged_tokens_choose", experts(Routing::ModeStaged, Choose::Token, 1, CausalMethod::Aux));
  add("mode_integrated_experts_choose",
      experts(Routing::ModeIntegrated, Choose::Expert, 1, CausalMethod::Predictor));
  add("mode_integrated_tokens_choose",
      experts(Routing::ModeIntegrated, Choose::Token, 1, CausalMethod::Auto));
  return kinds;
}

}  // namespace fathom::testing
