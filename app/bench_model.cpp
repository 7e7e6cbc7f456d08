#include "app/bench_model.h"

#include <algorithm>

#include <fmt/format.h>

#include "app/command.h"
#include "kernels/error.h"

namespace fathom::app {

namespace {

// The shapes of the PyTorch peer: name, width, depth, heads, hidden.
struct Preset {
  const char* name;
  std::int64_t width, depth, heads, hidden;
};
constexpr Preset kPresets[] = {{"d2", 128, 4, 2, 384},      {"d4", 256, 6, 4, 704},
                               {"d6", 384, 6, 6, 1024},     {"d12", 768, 12, 12, 2048},
                               {"d24", 1024, 24, 16, 2816}, {"d1b", 2048, 20, 16, 5632}};

constexpr const char* kVariants = "dense, mod, moe, moe-token, mode-staged or mode-integrated";

// What makes a model of --variant; as the PyTorch peer where it has the variant.
void route(const BenchModel& model, RoutingConfig& routing) {
  const std::string& variant = model.variant;
  routing.capacity = model.capacity;
  routing.experts.count = model.experts;
  routing.causal.method = CausalMethod::Aux;  // the peer's experts have no predictor
  if (variant == "mod" || variant == "mode-staged") {
    routing.kind = variant == "mod" ? RoutingKind::Mod : RoutingKind::ModeStaged;
    routing.causal.method = CausalMethod::Predictor;
  } else if (variant == "moe") {
    routing.kind = RoutingKind::Moe;
  } else if (variant == "moe-token") {  // top-2 of the experts, each with room for 1.25 times its share
    routing.kind = RoutingKind::Moe;
    routing.experts.choice = ExpertsChoose::Token;
    routing.experts.capacity_factor = 1.25;
  } else if (variant == "mode-integrated") {
    routing.kind = RoutingKind::ModeIntegrated;
    routing.experts.noop = model.experts;
    routing.experts.capacity_factor = 0.5;
  } else if (variant != "dense") {
    throw UsageError(fmt::format("--variant {} is not known.", variant),
                     fmt::format("Expected {}.", kVariants));
  }
}

}  // namespace

Config bench_model(const BenchModel& model) {
  const auto* preset = std::find_if(std::begin(kPresets), std::end(kPresets),
                                    [&](const Preset& p) { return model.preset == p.name; });
  if (preset == std::end(kPresets)) {
    throw UsageError(fmt::format("--preset {} is not known.", model.preset),
                     "Expected d2, d4, d6, d12, d24 or d1b.");
  }
  Config c;
  c.model.vocab_size = model.vocab;
  c.model.width = preset->width;
  c.model.depth = preset->depth;
  c.model.heads = preset->heads;
  c.model.ffn_hidden = preset->hidden;
  route(model, c.routing);
  return c;
}

void add_bench_model_flags(CLI::App& sub, BenchModel& model) {
  sub.add_option("--preset", model.preset, "d2 | d4 | d6 | d12 | d24 | d1b")->capture_default_str();
  sub.add_option("--variant", model.variant, fmt::format("One of {}", kVariants))->capture_default_str();
  sub.add_option("--vocab", model.vocab, "Vocabulary")->capture_default_str()->check(number_from_to(1, 1e9));
  sub.add_option("--capacity", model.capacity, "Of routed blocks (every other one)")
      ->capture_default_str()
      ->check(number_from_to(0.001, 1.0));
  sub.add_option("--experts", model.experts, "Of each MLP, in the variants that have experts")
      ->capture_default_str()
      ->check(number_from_to(1, 1024));
}

}  // namespace fathom::app
