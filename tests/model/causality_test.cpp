// Causal selection never looks ahead: changing the tokens after t leaves the logits up to t as they were, to
// the last bit in the row-invariant mode, to rounding in the fast one.
#include <cstring>
#include <optional>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/kernels/cpu_backends.h"
#include "tests/model/small_model.h"

namespace fathom::model_test {
namespace {

enum class Size {
  Small,  // every t of a short sequence
  Large,  // several tiles of attention and of the products, t about their edges
};

struct Case {
  std::string name;
  RoutingConfig routing;
  bool qk_norm = false;
  Size size = Size::Small;
  DType dtype = DType::F32;
  Device device = Device::Cpu;
  friend void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }
};

ModelConfig causal_config(const Case& of) {
  ModelConfig m = small_config();
  m.kv_heads = 2;
  m.qk_norm = of.qk_norm;
  if (of.size == Size::Large) {
    m.width = 96;
    m.ffn_hidden = 288;
  }
  return m;
}

std::int64_t length_of(const Case& of) { return of.size == Size::Small ? 40 : 200; }

std::vector<std::size_t> places(const Case& of) {
  if (of.size == Size::Large) return {0, 1, 3, 4, 31, 32, 33, 62, 63, 64, 65, 127, 128, 191, 192, 198};
  std::vector<std::size_t> all;
  for (std::size_t t = 0; t + 1 < static_cast<std::size_t>(length_of(of)); ++t) all.push_back(t);
  return all;
}

/// One pass over a single sequence.
struct Pass {
  std::vector<double> logits;           // [T, V]
  std::vector<std::vector<bool>> kept;  // by routed layer and by expert of dense blocks, [T]
};

Pass run(SmallModel& m, const std::vector<std::int32_t>& tokens, const SelectionRule& rule) {
  const auto length = static_cast<std::int64_t>(tokens.size());
  const ForwardResult result = m.model.forward(m.context, make_batch(m.context, 1, length, tokens, {}), rule);
  Pass pass{m.host(m.model.logits(m.context, result.hidden)), {}};
  for (const RoutedLayer& r : result.routing) {
    std::vector<bool> kept(tokens.size(), false);
    for (std::int32_t i : to_host<std::int32_t>(m.context.backend(), r.indices)) {
      kept[static_cast<std::size_t>(i)] = true;
    }
    pass.kept.push_back(std::move(kept));
  }
  for (const ExpertLayer& e : result.experts) {
    if (m.model.routing().routes(e.layer)) continue;  // its rows are the kept ones, not the tokens
    const std::vector<std::int32_t> slots =
        to_host<std::int32_t>(m.context.backend(), e.dispatch.slots);  // [E, T]
    for (std::size_t first = 0; first < slots.size(); first += tokens.size()) {
      std::vector<bool> taken;
      for (std::size_t i = 0; i < tokens.size(); ++i) taken.push_back(slots[first + i] >= 0);
      pass.kept.push_back(std::move(taken));
    }
  }
  return pass;
}

SelectionRule rule_of(const RoutingConfig& routing) {
  return routing.kind == RoutingKind::None ? SelectionRule(TopK{}) : SelectionRule(causal_rule(routing));
}

/// The tokens with everything after t changed.
std::vector<std::int32_t> other_future(std::vector<std::int32_t> tokens, std::size_t t, std::int64_t vocab) {
  for (std::size_t i = t + 1; i < tokens.size(); ++i) {
    tokens[i] = static_cast<std::int32_t>((tokens[i] + 1 + static_cast<std::int32_t>(i)) % vocab);
  }
  return tokens;
}

/// Decisions about the tokens up to t that differ.
std::int64_t flips_up_to(const Pass& a, const Pass& b, std::size_t t) {
  std::int64_t flips = 0;
  for (std::size_t layer = 0; layer < a.kept.size(); ++layer) {
    for (std::size_t i = 0; i <= t; ++i) flips += a.kept[layer][i] != b.kept[layer][i];
  }
  return flips;
}

class Causality : public OnDevice<Case> {
 protected:
  SmallModel make(bool invariant) {
    BackendOptions options;
    options.invariant = invariant;
    return SmallModel(GetParam().dtype, causal_config(GetParam()), GetParam().routing, options, device());
  }

  /// Calls compare(t, whole, other, how) with the pass over all tokens and, for each t, one with other tokens
  /// after t and one that ends at t.
  template <typename Compare>
  void for_other_futures(SmallModel& m, Compare&& compare) {
    const SelectionRule rule = rule_of(GetParam().routing);
    const std::vector<std::int32_t> tokens = m.random_tokens(length_of(GetParam()), 5);
    const Pass whole = run(m, tokens, rule);
    for (const std::size_t t : places(GetParam())) {
      compare(t, whole, run(m, other_future(tokens, t, m.model.config().vocab_size), rule), "another future");
      const auto end = tokens.begin() + static_cast<std::ptrdiff_t>(t) + 1;
      compare(t, whole, run(m, {tokens.begin(), end}, rule), "no future");
    }
  }
};

TEST_P(Causality, InvariantModeIsBitIdentical) {
  const std::vector<std::string> gpu = {"cuda"};
  for (const std::string& isa : device() == Device::Cpu ? testing_support::isas() : gpu) {
    std::optional<testing_support::ChosenIsa> chosen;
    if (device() == Device::Cpu) chosen.emplace(isa);
    SmallModel m = make(true);
    const auto vocab = static_cast<std::size_t>(m.model.config().vocab_size);
    for_other_futures(m, [&](std::size_t t, const Pass& whole, const Pass& other, const char* how) {
      const std::size_t bytes = (t + 1) * vocab * sizeof(double);
      EXPECT_EQ(std::memcmp(whole.logits.data(), other.logits.data(), bytes), 0)
          << isa << ", " << how << " after " << t;
      EXPECT_EQ(flips_up_to(whole, other, t), 0) << isa << ", " << how << " after " << t;
    });
  }
}

TEST_P(Causality, FastModeIsEqualToRounding) {
  SmallModel m = make(false);
  const auto vocab = static_cast<std::size_t>(m.model.config().vocab_size);
  std::int64_t flips = 0;
  std::int64_t decisions = 0;
  double worst = 0;
  for_other_futures(m, [&](std::size_t t, const Pass& whole, const Pass& other, const char*) {
    const std::int64_t flipped = flips_up_to(whole, other, t);
    flips += flipped;
    decisions += static_cast<std::int64_t>(whole.kept.size() * (t + 1));
    if (flipped > 0) return;  // another computation, not another rounding: counted instead
    const auto end = static_cast<std::ptrdiff_t>((t + 1) * vocab);
    worst = std::max(worst, relative_difference({other.logits.begin(), other.logits.begin() + end},
                                                {whole.logits.begin(), whole.logits.begin() + end}));
  });
  const bool in_bf16 = GetParam().dtype == DType::BF16;
  EXPECT_LT(worst, in_bf16 ? 3e-2 : 1e-5);
  EXPECT_LE(static_cast<double>(flips), (in_bf16 ? 2e-2 : 1e-3) * static_cast<double>(decisions));
  fmt::print("fast mode: largest relative difference {:.2e}, {} routing flips of {} decisions\n", worst,
             flips, decisions);
  RecordProperty("routing_flips", std::to_string(flips));
  RecordProperty("largest_relative_difference", fmt::format("{:.2e}", worst));
}

// The tests above can fail: top-k does look ahead, and they would see it.
TEST(TopKLooksAhead, AndTheComparisonSeesIt) {
  const Case of{"top-k", routed(CausalMethod::Aux)};
  SmallModel m(DType::F32, causal_config(of), of.routing);
  const std::vector<std::int32_t> tokens = m.random_tokens(length_of(of), 5);
  const Pass whole = run(m, tokens, TopK{});
  std::int64_t flips = 0;
  for (const std::size_t t : places(of)) {
    flips += flips_up_to(whole, run(m, other_future(tokens, t, m.model.config().vocab_size), TopK{}), t);
  }
  EXPECT_GT(flips, 0);
}

std::vector<Case> cases() {
  std::vector<Case> all = {
      {"dense", {}},
      {"dense_qk_norm", {}, true},
      {"mod_aux", routed(CausalMethod::Aux)},
      {"mod_predictor", routed(CausalMethod::Predictor, Gate::Sigmoid)},
      {"mod_both_tanh", routed(CausalMethod::Both, Gate::Tanh), true},
      {"moe_aux", with_experts(by(CausalMethod::Aux), RoutingKind::Moe)},
      {"moe_predictor", with_experts(by(CausalMethod::Predictor), RoutingKind::Moe, 0.5)},
      {"mode_integrated_both", with_experts(by(CausalMethod::Both), RoutingKind::ModeIntegrated), true},
      {"mode_staged_aux", with_experts(routed(CausalMethod::Aux, Gate::Raw, 0.5), RoutingKind::ModeStaged)},
      {"mode_staged_predictor",
       with_experts(routed(CausalMethod::Predictor, Gate::Sigmoid), RoutingKind::ModeStaged)},
      {"token_integrated", tokens_choose({}, RoutingKind::ModeIntegrated, 2)},
      {"token_staged", tokens_choose(routed(CausalMethod::Both, Gate::Sigmoid), RoutingKind::ModeStaged, 1)},
      {"large_dense", {}, false, Size::Large},
      {"large_mod_aux", routed(CausalMethod::Aux, Gate::Sigmoid), true, Size::Large},
      {"large_mod_predictor", routed(CausalMethod::Predictor), false, Size::Large},
      {"large_moe_aux", with_experts(by(CausalMethod::Aux), RoutingKind::Moe), false, Size::Large},
      {"large_mode_staged_both",
       with_experts(routed(CausalMethod::Both, Gate::Tanh), RoutingKind::ModeStaged), false, Size::Large}};
  if (testing_support::devices().back() != Device::Cuda) return all;
  const std::vector<Case> models = all;
  for (const DType dtype : {DType::F32, DType::BF16}) {
    for (Case of : models) {
      of.name += std::string("_cuda_") + name_of(dtype);
      of.dtype = dtype;
      of.device = Device::Cuda;
      all.push_back(of);
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Models, Causality, ::testing::ValuesIn(cases()),
                         [](const auto& p) { return p.param.name; });

}  // namespace
}  // namespace fathom::model_test
