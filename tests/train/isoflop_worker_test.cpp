// Workers on a sweep's folder, with a trainer that only pretends.
#include <cmath>
#include <map>
#include <mutex>
#include <thread>

#include <gmock/gmock.h>

#include "kernels/error.h"
#include "src/flops/flops.h"
#include "src/model/checkpoint.h"
#include "tests/train/test_folder.h"
#include "train/isoflop/take_over.h"
#include "train/isoflop/worker.h"
#include "train/metrics/metrics_log.h"

namespace fathom::isoflop {
namespace {

using ::testing::HasSubstr;
using testing_support::fresh_folder;
using testing_support::message_of;
using testing_support::write_file;

constexpr const char* kSweep = R"(
name: pretended
data: {train: train.h5, valid: valid.h5}
train: {seq_len: 32, batch_tokens: 256}
budgets: [1e9, 4e9]
shapes: [32x2, 32x4, 64x4, 64x8]
head_dim: 16
lr: {search: [1e-3, 2e-3, 4e-3]}
seeds_near_minimum: [2]
families:
  dense: {}
  mod:
    routing: {kind: mod, capacity: 0.25}
)";
constexpr DataSize kData{.tokens = 10'000'000, .vocab = 64};

// Lowest at a size that grows with the budget, and at a rate of 2e-3.
double loss_of(const Config& c) {
  const ParameterCount n = count_parameters(c);
  const double x =
      std::log10(static_cast<double>(n.active)) - 4.9 - 0.3 * std::log10(*c.train.target_flops / 1e9);
  const double rate = std::log2(c.train.lr / 2e-3);
  return 3 + 0.3 * x * x + 0.05 * rate * rate + 0.001 * static_cast<double>(c.seed);
}

TrainResult pretend(const Config& c, const std::filesystem::path& run) {
  std::filesystem::create_directories(run);
  MetricsLog log(run / "metrics.jsonl");
  const Horizon horizon = plan_horizon(c);
  EventRecord start;
  start.facts = RunFacts{};
  start.facts->device = "pretended";
  log.append(start);
  StepRecord step;
  step.step = horizon.steps;
  step.tokens_per_s = 1e6;
  step.seconds = static_cast<double>(horizon.tokens) / 1e6;
  log.append(step);
  EvalRecord eval;
  eval.step = horizon.steps;
  (c.routing.kind == RoutingKind::None ? eval.val_loss : eval.val_causal) = loss_of(c);
  log.append(eval);
  return {};
}

class Workers : public ::testing::Test {
 protected:
  Workers() {
    write_file(folder_path / "sweep.yaml", kSweep);
    sweep = load_sweep(folder_path / "sweep.yaml");
    folder.prepare(sweep, kData);
  }
  WorkOptions options() {
    WorkOptions o;
    o.poll_seconds = 0.01;
    return o;
  }
  std::vector<Row> rows() { return rows_of(sweep, &folder, kData); }

  std::filesystem::path folder_path = fresh_folder();
  Sweep sweep;
  SweepFolder folder{folder_path / "out"};
};

TEST_F(Workers, SearchThenGridThenFurtherSeeds) {
  const WorkResult r = work(sweep, folder, kData, pretend, options());
  // 2 families: 3 rates; 2 budgets of 4 shapes, and at most 3 shapes of a second seed.
  EXPECT_EQ(r.failed, 0);
  EXPECT_EQ(r.left, 0);
  const std::vector<Row> all = rows();
  EXPECT_EQ(static_cast<std::int64_t>(all.size()), r.done);
  std::int64_t near = 0;
  for (const Row& row : all) {
    EXPECT_TRUE(row.done()) << row.cell;
    if (row.role != "search") {
      EXPECT_DOUBLE_EQ(*row.lr, 2e-3);
    }
    near += row.role == "near" ? 1 : 0;
  }
  EXPECT_GE(near, 8);
  EXPECT_LE(near, 12);
  EXPECT_EQ(work(sweep, folder, kData, pretend, options()).done, 0);  // nothing is left to do
}

TEST_F(Workers, NeverRunACellTwice) {
  std::mutex mutex;
  std::map<std::string, int> runs;
  const TrainCell train = [&](const Config& c, const std::filesystem::path& run) {
    {
      const std::lock_guard<std::mutex> guard(mutex);
      ++runs[run.filename().string()];
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    return pretend(c, run);
  };
  std::vector<std::thread> workers;
  for (int i = 0; i < 4; ++i) workers.emplace_back([&] { work(sweep, folder, kData, train, options()); });
  for (std::thread& t : workers) t.join();
  const std::vector<Row> all = rows();
  EXPECT_EQ(runs.size(), all.size());
  for (const auto& [cell, count] : runs) EXPECT_EQ(count, 1) << cell;
  for (const Row& row : all) EXPECT_TRUE(row.done()) << row.cell;
}

TEST_F(Workers, RecordAFailureAndGoOn) {
  const TrainCell train = [&](const Config& c, const std::filesystem::path& run) {
    if (c.model.width == 64 && c.model.depth == 8 && c.seed == 1) {
      TrainResult r;
      r.status = RunStatus::Failed;
      r.message = "the loss is NaN at step 3";
      return r;
    }
    return pretend(c, run);
  };
  const WorkResult r = work(sweep, folder, kData, train, options());
  EXPECT_EQ(r.failed, 4);
  EXPECT_EQ(r.left, 0);
  for (const Row& row : rows()) {
    const bool fails = row.width == 64 && row.depth == 8;
    EXPECT_EQ(row.status, fails ? "failed" : "done") << row.cell;
    if (fails) {
      EXPECT_THAT(row.reason, HasSubstr("NaN at step 3"));
    }
  }
  EXPECT_EQ(work(sweep, folder, kData, pretend, options()).done, 0);
  WorkOptions retry = options();
  retry.retry_failed = true;
  EXPECT_EQ(work(sweep, folder, kData, pretend, retry).done, 4);
}

TEST_F(Workers, EndWhenEveryCellThrows) {
  const TrainCell broken = [](const Config&, const std::filesystem::path&) -> TrainResult {
    throw UserError("the device is gone.");
  };
  EXPECT_THAT(message_of<UserError>([&] { work(sweep, folder, kData, broken, options()); }),
              ::testing::AllOf(HasSubstr("the device is gone"), HasSubstr("--retry-failed")));
}

TEST_F(Workers, EndWhenTheDeviceIsLost) {
  int calls = 0;
  const auto faults = [&](const Config& c, const std::filesystem::path& run) {
    if (++calls == 2) throw DeviceError("[linear] CUDA: an illegal memory access");
    return pretend(c, run);
  };
  const std::string said = message_of<UserError>([&] { work(sweep, folder, kData, faults, options()); });
  EXPECT_THAT(said, HasSubstr("illegal memory access"));
  EXPECT_THAT(said, HasSubstr("--retry-failed"));
  EXPECT_EQ(calls, 2);  // no cell was tried with a device that answers with errors only
  std::int64_t failed = 0;
  for (const Row& row : rows()) failed += row.status == "failed" ? 1 : 0;
  EXPECT_EQ(failed, 1);
}

TEST_F(Workers, TakeOnlyWhatTheyAreAskedFor) {
  WorkOptions o = options();
  o.only = {"search-dense-*"};
  o.max_cells = 2;
  EXPECT_EQ(work(sweep, folder, kData, pretend, o).done, 2);
  const WorkResult rest = work(sweep, folder, kData, pretend, o);
  EXPECT_EQ(rest.done, 1);
  EXPECT_EQ(rest.left, 0);
  EXPECT_FALSE(folder.decisions(sweep).lr.contains("mod"));
}

// A table alone gives the folder back: the same rows, rates and further seeds, and nothing left to train.
TEST_F(Workers, GoOnFromATable) {
  work(sweep, folder, kData, pretend, options());
  const std::vector<Row> before = rows();
  std::vector<Row> table = read_csv(to_csv(before), "table.csv");
  const std::string left_out = table.back().cell;
  table.back().status = "todo";
  Row foreign = table.front();
  foreign.cell = "../../elsewhere";
  table.push_back(foreign);

  const SweepFolder again(folder_path / "again");
  again.prepare(sweep, kData);
  const TakenOver t = take_over(sweep, again, kData, table);
  EXPECT_EQ(t.taken, static_cast<std::int64_t>(before.size()) - 1);
  EXPECT_EQ(t.known, 0);
  EXPECT_EQ(t.open, 1);
  EXPECT_EQ(t.foreign, 1);
  EXPECT_EQ(take_over(sweep, again, kData, table).known, t.taken);
  EXPECT_EQ(again.decisions(sweep).near, folder.decisions(sweep).near);

  std::vector<std::string> trained;
  work(
      sweep, again, kData,
      [&](const Config& c, const std::filesystem::path& run) {
        trained.push_back(run.filename().string());
        return pretend(c, run);
      },
      options());
  EXPECT_EQ(trained, std::vector<std::string>{left_out});
  EXPECT_EQ(rows_of(sweep, &again, kData), before);
}

TEST_F(Workers, RefuseATableOfSomethingElse) {
  work(sweep, folder, kData, pretend, options());
  std::vector<Row> table = rows();
  const SweepFolder again(folder_path / "again");
  again.prepare(sweep, kData);
  table.front().trained = "0123456789abcdef";
  EXPECT_THAT(message_of<UserError>([&] { take_over(sweep, again, kData, table); }),
              ::testing::AllOf(HasSubstr(table.front().cell), HasSubstr("another config")));
  EXPECT_FALSE(again.read_result(table.front().cell));
  table.front().store_tokens = 5;
  EXPECT_THAT(message_of<UserError>([&] { take_over(sweep, again, kData, table); }),
              HasSubstr("a store of 5 tokens"));
}

TEST_F(Workers, NoticeThatTheSweepFileHasChanged) {
  WorkOptions o = options();
  o.max_cells = 1;
  work(sweep, folder, kData, pretend, o);
  write_file(folder_path / "sweep.yaml", std::string(kSweep) + "routing: {every: 1}\n");
  const Sweep harmless = load_sweep(folder_path / "sweep.yaml");
  EXPECT_THAT(message_of<UserError>([&] { work(harmless, folder, kData, pretend, o); }),
              HasSubstr("another config"));
  EXPECT_THAT(message_of<UserError>([&] { rows_of(harmless, &folder, kData); }), HasSubstr("another config"));
  EXPECT_THAT(message_of<UserError>([&] { folder.prepare(sweep, {.tokens = 5, .vocab = 64}); }),
              HasSubstr("5 and 64"));
}

TEST_F(Workers, StatusCountsAndEstimates) {
  WorkOptions o = options();
  o.max_cells = 5;
  work(sweep, folder, kData, pretend, o);
  const auto claim = Claim::take(folder.claim("search-mod-1e+09-64x4-lr0.004"));
  ASSERT_TRUE(claim);
  const std::vector<Row> all = rows();
  const std::string text = status_text(sweep, folder, all, folder.decisions(sweep));
  EXPECT_THAT(text, ::testing::AllOf(HasSubstr("5 done, 0 failed, 1 running"),
                                     HasSubstr("The rest takes about"), HasSubstr("process")));
}

}  // namespace
}  // namespace fathom::isoflop
