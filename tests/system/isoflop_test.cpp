// fathom isoflop from the command line: a sweep left alone, and the same one with workers killed all the
// time. FATHOM_KILLS says how many kills (10 by default), FATHOM_KILL_SEED which moments.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <random>
#include <thread>

#include <gtest/gtest.h>

#include "src/core/stopwatch.h"
#include "tests/system/cli.h"
#include "train/isoflop/row.h"
#include "train/run_folder.h"

namespace fathom {
namespace {

using testing::Background;
using testing::expect_refusal;
using testing::Experiment;
using testing::fathom_command;
using testing::Outcome;
using testing::read_bytes;
using testing::write_bytes;

constexpr const char* kSweep = R"(
name: least
deterministic: true
data: {train: train.h5, valid: train.valid.h5}
train: {seq_len: 32, batch_tokens: 256, eval_tokens: 512, log_every: 1}
budgets: [6e9, 1.2e10]
shapes: [16x1, 16x2, 32x2]
head_dim: 16
lr: {search: [2e-3, 4e-3], width_exponent: 0.5}
seeds_near_minimum: [2]
neighbours: 0
checkpoints: 30
max_passes: 20
families:
  dense: {}
  mod:
    routing: {kind: mod, first: 0, capacity: 0.25, causal: {method: aux}}
)";

int setting(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::atoi(text) : otherwise;
}

// The sweep's table without what depends on the clock.
std::vector<isoflop::Row> table(const Experiment& e, const std::string& dir) {
  const Outcome report = fathom_command(e, "isoflop report least.yaml --dir " + dir + " -o " + dir + ".html");
  EXPECT_EQ(report.status, 0) << report.err;
  std::vector<isoflop::Row> rows = isoflop::read_csv(read_bytes(e / (dir + ".csv")), dir);
  for (isoflop::Row& r : rows) {
    r.seconds.reset();
    r.step_seconds.reset();
    r.memory_bytes.reset();
    r.resumes.reset();
  }
  return rows;
}

class Isoflop : public ::testing::Test {
 protected:
  Isoflop() { write_bytes(e / "least.yaml", kSweep); }
  static std::string worker(const std::string& dir) {
    return "isoflop run least.yaml --threads 1 --dir " + dir;
  }
  Experiment e;
};

TEST_F(Isoflop, KilledAndSharedSweepsEndWithTheTableOfOneLeftAlone) {
  const Stopwatch watch;
  const Outcome alone = fathom_command(e, worker("alone"));
  const double took = watch.seconds();
  ASSERT_EQ(alone.status, 0) << alone.err;
  const std::vector<isoflop::Row> expected = table(e, "alone");
  ASSERT_GE(expected.size(), 2 * 2 + 2 * 2 * 3u + 4);
  for (const isoflop::Row& r : expected) EXPECT_EQ(r.status, "done") << r.cell << " " << r.reason;

  const int kills = setting("FATHOM_KILLS", 10);
  std::mt19937 random(static_cast<unsigned>(setting("FATHOM_KILL_SEED", 1)));
  // A tenth of a sweep at the most: a machine on which one is short would be through before the kills are.
  std::uniform_int_distribution<int> after_ms(50, std::clamp(static_cast<int>(100 * took), 60, 900));
  int killed = 0, starts = 0;
  while (killed < kills && starts < 20 * kills) {
    // Two workers at once, of which one is killed and then the other.
    Background first(e, worker("killed")), second(e, worker("killed"));
    ++starts;
    for (Background* worker : {&first, &second}) {
      std::this_thread::sleep_for(std::chrono::milliseconds(after_ms(random)));
      if (!worker->running()) continue;
      worker->signal(SIGKILL);
      ++killed;
    }
    first.wait();
    second.wait();
    const Outcome status = fathom_command(e, "isoflop status least.yaml --dir killed --json");
    if (status.status == 0 && status.json()["todo"] == 0) break;
  }
  Background first(e, worker("killed")), second(e, worker("killed"));
  EXPECT_EQ(first.wait().status, 0);
  EXPECT_EQ(second.wait().status, 0);
  EXPECT_EQ(fathom_command(e, worker("killed")).status, 0);  // what both left to each other
  const std::vector<isoflop::Row> rows = table(e, "killed");
  ASSERT_EQ(rows.size(), expected.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    EXPECT_EQ(isoflop::to_json(rows[i]), isoflop::to_json(expected[i]));
  }
  std::cout << killed << " kills in " << starts << " starts of two workers, " << rows.size() << " cells\n";
  EXPECT_GE(killed, std::min(kills, 10)) << "the sweep was through before it could be killed so often";
}

TEST_F(Isoflop, TwoWorkersNeverRunACellTwice) {
  Background first(e, worker("shared")), second(e, worker("shared"));
  EXPECT_EQ(first.wait().status, 0);
  EXPECT_EQ(second.wait().status, 0);
  EXPECT_EQ(fathom_command(e, worker("shared")).status, 0);
  std::int64_t cells = 0;
  for (const auto& cell : std::filesystem::directory_iterator(e / "shared/cells")) {
    int starts = 0, ends = 0;
    for (const nlohmann::json& line : e.lines("shared/cells/" + cell.path().filename().string())) {
      if (line.value("event", "") == "start" || line.value("event", "") == "resume") ++starts;
      if (line.value("event", "") == "end") ++ends;
    }
    EXPECT_EQ(starts, 1) << cell.path();
    EXPECT_EQ(ends, 1) << cell.path();
    ++cells;
  }
  EXPECT_EQ(cells, static_cast<std::int64_t>(table(e, "shared").size()));
}

TEST_F(Isoflop, PlansWithoutAStoreWhenItIsToldItsSize) {
  std::filesystem::remove(e / "train.h5");
  expect_refusal(fathom_command(e, "isoflop plan least.yaml"), 2,
                 {"train.h5, which is not there", "--data-tokens N and --vocab N"});
  const std::string size = "isoflop plan least.yaml --data-tokens 60000 --vocab 257 ";
  const nlohmann::json plan = fathom_command(e, size + "--flops-per-second 1e9 --json").json();
  EXPECT_EQ(plan["cells_total"], 4 + 12);
  EXPECT_EQ(plan["cells_undecided"], 4);
  EXPECT_GT(plan["seconds"], 1);
  EXPECT_EQ(plan["cells"][0]["status"], "todo");
  const Outcome text = fathom_command(e, size);
  EXPECT_NE(text.out.find("dense-6e+09-16x1-s1"), std::string::npos) << text.out << text.err;
  expect_refusal(fathom_command(e, "isoflop plan least.yaml --data-tokens 600 --vocab 257"), 2,
                 {"passes over 600 tokens", "allow_repeats: true"});
}

TEST_F(Isoflop, ReportsAgainFromItsCsv) {
  ASSERT_EQ(fathom_command(e, worker("out") + " --only '*-1.2e+10-*' --only 'search-*'").status, 0);
  const std::string fit = "isoflop fit least.yaml --dir out --json";
  ASSERT_EQ(fathom_command(e, "isoflop report out -o a.html").status, 0);
  const Outcome before = fathom_command(e, fit);
  const Outcome after = fathom_command(e, "isoflop report --from-csv a.csv -o b.html --json");
  EXPECT_EQ(before.json(), after.json());
  EXPECT_EQ(read_bytes(e / "a.html"), read_bytes(e / "b.html"));
  EXPECT_EQ(read_bytes(e / "a.csv"), read_bytes(e / "b.csv"));
  EXPECT_EQ(before.json()["claims"].size() > 5, true);
}

TEST_F(Isoflop, RefusesInOneParagraph) {
  expect_refusal(fathom_command(e, "isoflop run none.yaml"), 2, {"none.yaml"});
  expect_refusal(fathom_command(e, "isoflop status least.yaml --dir nowhere"), 1, {"nowhere", "isoflop run"});
  expect_refusal(fathom_command(e, "isoflop fit"), 2, {"--from-csv"});
  expect_refusal(fathom_command(e, "isoflop report --from-csv none.csv"), 1, {"none.csv"});
  write_bytes(e / "no-valid.yaml",
              "data: {train: train.h5}\nbudgets: [1e9]\nshapes: [32x2]\nfamilies: {a: {}}\n");
  expect_refusal(fathom_command(e, "isoflop run no-valid.yaml"), 2, {"data.valid"});
  write_bytes(e / "bad.yaml", "budgts: [1e9]\n");
  expect_refusal(fathom_command(e, "isoflop plan bad.yaml"), 2, {"bad.yaml:1", "Did you mean budgets?"});
  write_bytes(e / "file", "");
  expect_refusal(fathom_command(e, worker("file")), 1, {"file"});
}

}  // namespace
}  // namespace fathom
