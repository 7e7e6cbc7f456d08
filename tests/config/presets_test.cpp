// Every file of configs/ loads, and the two files of a pair spend the same training FLOPs.
#include <cmath>
#include <filesystem>

#include <gtest/gtest.h>

#include "src/config/parse.h"
#include "src/config/print.h"
#include "src/config/resolve.h"
#include "src/flops/flops.h"

namespace fathom {
namespace {

const std::filesystem::path kConfigs = std::filesystem::path(FATHOM_SOURCE_DIR) / "configs";

Config load(const std::string& name) { return resolve(load_config(kConfigs / (name + ".yaml")), 4096); }

TEST(Presets, EveryFileLoads) {
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(kConfigs)) {
    if (entry.path().extension() != ".yaml") continue;
    SCOPED_TRACE(entry.path().string());
    const Config c = resolve(load_config(entry.path()), 4096);
    EXPECT_EQ(parse_config(to_yaml(c), "printed", {}), c);
    EXPECT_TRUE(config_notes(c).empty());
    EXPECT_GE(plan_horizon(c).steps, 50);
    ++files;
  }
  EXPECT_GE(files, 15);
}

TEST(Presets, PairsDifferInRoutingOnlyAndSpendTheSame) {
  const std::pair<const char*, const char*> pairs[] = {{"quick-dense", "quick-mod"},
                                                       {"quickstart-dense", "quickstart-mod"},
                                                       {"gutenberg-dense", "gutenberg-mod-aux"},
                                                       {"gutenberg-dense", "gutenberg-mod-predictor"},
                                                       {"d2-dense", "d2-mod"},
                                                       {"d4-dense", "d4-mod"},
                                                       {"d6-dense", "d6-mod"},
                                                       {"d12-dense", "d12-mod"},
                                                       {"long-dense", "long-mod"}};
  for (const auto& [dense_name, mod_name] : pairs) {
    SCOPED_TRACE(mod_name);
    const Config dense = load(dense_name);
    Config mod = load(mod_name);
    const Horizon a = plan_horizon(dense), b = plan_horizon(mod);
    EXPECT_GT(b.steps, a.steps);
    // The number of steps is whole, so the two differ by less than one step.
    EXPECT_LT(std::abs(a.flops - b.flops), train_flops_per_step(dense));
    EXPECT_EQ(mod.routing.kind, RoutingKind::Mod);
    mod.routing = dense.routing;
    EXPECT_EQ(mod, dense) << difference(mod, dense);
  }
}

TEST(Presets, ExpertsDifferInRoutingOnlyAndSpendTheSame) {
  for (const auto& [name, kind] : {std::pair{"quick-moe", RoutingKind::Moe},
                                   {"quick-mode-staged", RoutingKind::ModeStaged},
                                   {"quick-mode-integrated", RoutingKind::ModeIntegrated}}) {
    SCOPED_TRACE(name);
    const Config dense = load("quick-dense");
    Config experts = load(name);
    const double least = train_flops_per_step(dense);
    EXPECT_LT(std::abs(plan_horizon(dense).flops - plan_horizon(experts).flops), 1.01 * least);
    EXPECT_EQ(experts.routing.kind, kind);
    experts.routing = dense.routing;
    EXPECT_EQ(experts, dense) << difference(experts, dense);
  }
}

}  // namespace
}  // namespace fathom
