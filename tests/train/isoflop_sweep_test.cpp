// A sweep's file, its cells and its plan.
#include <cmath>
#include <filesystem>

#include <gmock/gmock.h>

#include "kernels/error.h"
#include "src/flops/flops.h"
#include "src/io/atomic_file.h"
#include "tests/train/test_folder.h"
#include "train/isoflop/plan.h"
#include "train/isoflop/take_over.h"

namespace fathom::isoflop {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing_support::fresh_folder;
using testing_support::message_of;
using testing_support::write_file;

constexpr const char* kSweep = R"(
name: small
data: {train: train.h5, valid: valid.h5}
train: {seq_len: 32, batch_tokens: 256}
budgets: [4e9, 1e9]
shapes: [32x2, 32x4, 64x4]
head_dim: 16
families:
  dense: {}
  mod:
    routing: {kind: mod, capacity: 0.25}
    shapes: [32x4, 64x4, 64x6]
  stochastic:
    budgets: [4e9]
    routing: {kind: mod, selection: stochastic}
)";

class SweepFile : public ::testing::Test {
 protected:
  Sweep load(const std::string& text) {
    write_file(folder / "sweep.yaml", text);
    return load_sweep(folder / "sweep.yaml");
  }
  std::string refusal(const std::string& text) {
    return message_of<UsageError>([&] { load(text); });
  }

  std::filesystem::path folder = fresh_folder();
};

std::vector<std::string> ids(const std::vector<Cell>& cells) {
  std::vector<std::string> out;
  for (const Cell& c : cells) out.push_back(c.id);
  return out;
}

TEST_F(SweepFile, GivesCellsOfEveryFamilyBudgetShapeAndSeed) {
  const Sweep s = load(kSweep);
  EXPECT_THAT(s.budgets, ElementsAre(1e9, 4e9));
  EXPECT_THAT(ids(cells_of(s, {})),
              ElementsAre("dense-1e+09-32x2-s1", "mod-1e+09-32x4-s1", "dense-1e+09-32x4-s1",
                          "mod-1e+09-64x4-s1", "dense-1e+09-64x4-s1", "mod-1e+09-64x6-s1",
                          "dense-4e+09-32x2-s1", "mod-4e+09-32x4-s1", "stochastic-4e+09-32x2-s1",
                          "dense-4e+09-32x4-s1", "mod-4e+09-64x4-s1", "stochastic-4e+09-32x4-s1",
                          "dense-4e+09-64x4-s1", "mod-4e+09-64x6-s1", "stochastic-4e+09-64x4-s1"));
}

TEST_F(SweepFile, ConfiguresACellFromItsFamilyShapeAndBudget) {
  const Sweep s = load(kSweep);
  Cell cell = cells_of(s, {})[1];
  cell.seed = 7;
  const Config c = config_of(s, cell, 257);
  EXPECT_EQ(c.model.width, 32);
  EXPECT_EQ(c.model.depth, 4);
  EXPECT_EQ(c.model.heads, 2);
  EXPECT_EQ(c.model.vocab_size, 320);
  EXPECT_EQ(c.routing.kind, RoutingKind::Mod);
  EXPECT_DOUBLE_EQ(c.routing.capacity, 0.25);
  EXPECT_EQ(c.seed, 7u);
  EXPECT_EQ(c.train.target_flops, 1e9);
  EXPECT_FALSE(c.train.steps || c.train.tokens);
  const Row row = planned_row(s, cell, {.tokens = 100000, .vocab = 257});
  EXPECT_EQ(row.kind, "mod");
  EXPECT_EQ(row.steps, plan_horizon(c).steps);
  EXPECT_DOUBLE_EQ(row.passes, static_cast<double>(row.tokens) / 100000);
}

// The sweep's head_dim says how many heads a shape has; another one of the base would make them wider.
TEST_F(SweepFile, TakesNoHeadsSizeFromItsBase) {
  Sweep s = load("budgets: [1e9]\nfamilies: {dense: }\nshapes: [64x2]\nhead_dim: 16\n");
  s.base.model.own_head_dim = 128;
  const Config c = config_of(s, cells_of(s, {}).front(), 64);
  EXPECT_EQ(c.model.heads, 4);
  EXPECT_EQ(c.model.head_dim(), 16);
}

TEST_F(SweepFile, TakesExplicitHeadsAndHiddenWidth) {
  Sweep s = load("budgets: [1e9]\nfamilies: {dense: }\nshapes: [64x2x2x96]\n");
  const Config c = config_of(s, cells_of(s, {}).front(), 64);
  EXPECT_EQ(c.model.heads, 2);
  EXPECT_EQ(c.model.ffn_hidden, 96);
}

TEST_F(SweepFile, TakesWidthsAndDepthsWithDepthFirst) {
  const Sweep s = load(
      "budgets: [1e9]\nfamilies: {dense: {}}\nshapes: {widths: [32, 64], depths: [2, 4]}\nhead_dim: 32\n");
  EXPECT_THAT(ids(cells_of(s, {})), ElementsAre("dense-1e+09-32x2-s1", "dense-1e+09-32x4-s1",
                                                "dense-1e+09-64x2-s1", "dense-1e+09-64x4-s1"));
}

TEST_F(SweepFile, TakesShapesByBudget) {
  const Sweep s = load(
      "budgets: [1e9, 2.5e9]\nfamilies: {dense: {}, wide: {shapes: {2.5e9: [96x2]}}}\n"
      "shapes: {1e9: [32x2], 2.5e9: [64x2, 64x4]}\nhead_dim: 32\n");
  EXPECT_THAT(ids(cells_of(s, {})),
              ElementsAre("dense-1e+09-32x2-s1", "wide-1e+09-32x2-s1", "dense-2.5e+09-64x2-s1",
                          "wide-2.5e+09-96x2-s1", "dense-2.5e+09-64x4-s1"));
}

TEST_F(SweepFile, BuildsOnAConfigBesideIt) {
  write_file(folder / "base.yaml", "train: {steps: 5, seq_len: 64, batch_tokens: 128, lr: 5e-3}\n");
  const Sweep s = load(
      "base: base.yaml\nbudgets: [1e9]\nfamilies: {dense: {}}\nshapes: [64x2]\n"
      "train: {batch_tokens: 256}\n");
  const Config c = config_of(s, cells_of(s, {}).front(), 64);
  EXPECT_EQ(c.train.seq_len, 64);
  EXPECT_EQ(c.train.batch_tokens, 256);
  EXPECT_DOUBLE_EQ(c.train.lr, 5e-3);
}

TEST_F(SweepFile, SearchesTheRateWithTheSameEffortForEachFamilyAndTransfersIt) {
  const Sweep s = load(std::string(kSweep) + "lr: {search: [4e-3, 2e-3], width_exponent: 0.5}\n");
  const std::vector<Cell> cells = cells_of(s, {});
  ASSERT_EQ(cells.size(), 6u + 15u);
  EXPECT_EQ(cells[0].id, "search-dense-1e+09-32x4-lr0.002");
  EXPECT_EQ(cells[5].id, "search-stochastic-1e+09-32x4-lr0.004");
  EXPECT_FALSE(cells[6].lr.has_value());
  Decisions decided;
  decided.lr = {{"dense", 4e-3}};
  for (const Cell& c : cells_of(s, decided)) {
    if (c.role == Role::Search) continue;
    EXPECT_EQ(c.lr.has_value(), c.family == "dense");
    if (c.lr) {
      EXPECT_NEAR(*c.lr, c.shape.width == 32 ? 4e-3 : 4e-3 / std::sqrt(2.0), 1e-15);
    }
  }
}

TEST_F(SweepFile, AddsSeedsBesideADecidedMinimum) {
  const Sweep s = load(std::string(kSweep) + "seeds_near_minimum: [2, 3]\n");
  EXPECT_EQ(undecided_near_cells(s, {}), 5 * 3 * 2);
  Decisions decided;
  decided.near[{"mod", 4e9}] = {{.width = 64, .depth = 4}};
  const std::vector<std::string> all = ids(cells_of(s, decided));
  EXPECT_THAT(all, ::testing::Contains("mod-4e+09-64x4-s3"));
  EXPECT_EQ(all.size(), 17u);
  EXPECT_EQ(undecided_near_cells(s, decided), 4 * 3 * 2);
}

TEST_F(SweepFile, RefusesToRepeatTheTextTooOften) {
  Sweep s = load(kSweep);
  const DataSize few{.tokens = 3000, .vocab = 257};
  const std::vector<Row> rows = rows_of(s, nullptr, few);
  const std::string message = message_of<UsageError>([&] { require_few_passes(s, rows); });
  EXPECT_THAT(message, HasSubstr("allow_repeats: true"));
  EXPECT_THAT(message, HasSubstr("more than 4 times"));
  s.allow_repeats = true;
  EXPECT_NO_THROW(require_few_passes(s, rows));
  EXPECT_THAT(plan_text(s, rows, Rates(rows), summarise(s, rows, Rates(rows), {}), few),
              HasSubstr("drawn, not fitted"));
}

TEST_F(SweepFile, SaysWhatIsWrongAndWhatWasMeant) {
  const std::string good = "budgets: [1e9]\nshapes: [32x2]\nfamilies: {dense: {}}\n";
  EXPECT_THAT(refusal(good + "budgts: [1]\n"), HasSubstr("Did you mean budgets?"));
  EXPECT_THAT(refusal(good + "budgts: [1]\n"), HasSubstr("sweep.yaml:4"));
  EXPECT_THAT(refusal(good + "model: {widht: 3}\n"), HasSubstr("model.width"));
  EXPECT_THAT(refusal(good + "lr: {serach: [1e-3, 2e-3]}\n"), HasSubstr("Did you mean lr.search?"));
  EXPECT_THAT(refusal(good + "model: {width: 3}\n"), HasSubstr("Give shapes."));
  EXPECT_THAT(refusal(good + "train: {steps: 3}\n"), HasSubstr("Give budgets."));
  EXPECT_THAT(refusal(good + "seed: 3\n"), HasSubstr("Give seeds."));
  EXPECT_THAT(refusal("budgets: [1e9]\nshapes: [32]\nfamilies: {dense: {}}\n"), HasSubstr("WIDTHxDEPTH"));
  EXPECT_THAT(refusal("budgets: [-1]\nshapes: [32x2]\nfamilies: {dense: {}}\n"), HasSubstr("training FLOPs"));
  EXPECT_THAT(refusal("shapes: [32x2]\nfamilies: {dense: {}}\n"), HasSubstr("no budgets"));
  EXPECT_THAT(refusal("budgets: [1e9]\nshapes: [32x2]\n"), HasSubstr("no families"));
  EXPECT_THAT(refusal("budgets: [1e9]\nfamilies: {dense: {}}\n"), HasSubstr("no shapes"));
  EXPECT_THAT(refusal(good + "seeds: [1, 1]\n"), HasSubstr("different whole numbers"));
  EXPECT_THAT(refusal(good + "max_passes: many\n"), HasSubstr("a number above 0"));
  EXPECT_THAT(refusal("budgets: [1e9]\nshapes: [32x2]\nfamilies: {mod: {routing: {kidn: mod}}}\n"),
              HasSubstr("routing.kind"));
  EXPECT_THAT(refusal("budgets: [1e9]\nshapes: [32x2]\nfamilies: {mod: {deterministic: true}}\n"),
              HasSubstr("the same for all families"));
  EXPECT_THAT(refusal("budgets: [1e9]\nshapes: [32x2]\nfamilies: {mod: {budgets: [2e9]}}\n"),
              HasSubstr("does not have"));
  EXPECT_THAT(refusal("budgets: [1e9]\nshapes: [32x2]\nfamilies: {Mod: {}}\n"),
              HasSubstr("cannot be called"));
  EXPECT_THAT(refusal(good + "lr: {fixed: 1e-3, width_exponent: 1}\n"), HasSubstr("lr.reference_width"));
  const Sweep s = load("budgets: [1e9]\nshapes: [33x2]\nfamilies: {dense: {}}\nhead_dim: 3\n");
  EXPECT_THAT(message_of<UsageError>([&] { config_of(s, cells_of(s, {}).front(), 64); }),
              HasSubstr("dense-1e+09-33x2-s1"));
}

// The sweeps that come with Fathom, on as much text as the books have: each can be planned, no cell reads it
// more often than is fitted, and all cells spend their budget.
TEST(SweepConfigs, CanBePlanned) {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(FATHOM_SOURCE_DIR "/configs/isoflop")) {
    if (entry.path().extension() != ".yaml") continue;
    SCOPED_TRACE(entry.path().filename().string());
    const Sweep sweep = load_sweep(entry.path());
    const std::vector<Row> rows = rows_of(sweep, nullptr, {.tokens = 140997261, .vocab = 257});
    EXPECT_FALSE(rows.empty());
    EXPECT_NO_THROW(require_few_passes(sweep, rows));
    for (const Row& row : rows) EXPECT_NEAR(row.flops / row.budget, 1, 0.01) << row.cell;
    ++count;
  }
  EXPECT_GE(count, 3);
}

// What was published stays the beginning of a sweep, whatever keys a config has got since.
TEST(SweepConfigs, ThePublishedTableGoesOn) {
  const std::string table = FATHOM_SOURCE_DIR "/docs/results/isoflop/books.csv";
  const std::vector<Row> rows = read_csv(read_file(table, "table"), table);
  const Sweep sweep = load_sweep(FATHOM_SOURCE_DIR "/configs/isoflop/books.yaml");
  const SweepFolder folder(fresh_folder());
  const DataSize data{.tokens = rows.front().store_tokens, .vocab = 257};
  folder.prepare(sweep, data);
  const TakenOver t = take_over(sweep, folder, data, rows);
  EXPECT_GE(t.taken, 148);
  EXPECT_EQ(t.foreign, 0);
}

}  // namespace
}  // namespace fathom::isoflop
