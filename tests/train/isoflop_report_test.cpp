// A sweep's table as CSV, and its page.
#include <gmock/gmock.h>

#include "kernels/error.h"
#include "tests/train/test_folder.h"
#include "train/isoflop/sweep_report.h"

namespace fathom::isoflop {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using testing_support::fresh_folder;
using testing_support::message_of;
using testing_support::read_file;

Row cell(const std::string& family, double budget, int i) {
  Row r;
  r.sweep = "made, \"up\"";
  r.cell = family + "-" + std::to_string(i);
  r.role = "grid";
  r.family = family;
  r.kind = family == "dense" ? "none" : "mod";
  r.status = "done";
  r.budget = r.flops = budget;
  r.width = 64 * i;
  r.depth = 2 + i;
  r.heads = i;
  r.seed = 1;
  r.lr = 1.0 / 3e3;
  r.params_active = r.params_total = 100000 * i * i;
  r.flops_per_token_forward = 2e5 * i * i;
  r.steps = 100 / i;
  r.tokens = 1000 * r.steps;
  r.store_tokens = 100000;
  r.passes = static_cast<double>(r.tokens) / 1e5;
  r.max_passes = 4;
  const double x = i - 3.1;
  (r.kind == "none" ? r.val_loss : r.val_causal) = 3 + 0.1 * x * x + 0.01 * (i % 2) - 1e-17 * budget;
  if (r.kind != "none") r.val_topk = *r.val_causal;
  r.best_val = r.judged();
  r.seconds = 2.5 * i;
  r.step_seconds = 0.01 * i;
  r.device = "cpu (2 threads)";
  return r;
}

std::vector<Row> table() {
  std::vector<Row> rows;
  for (const char* family : {"dense", "mod"}) {
    for (const double budget : {1e15, 4e15}) {
      for (int i = 1; i <= 5; ++i) rows.push_back(cell(family, budget, i));
    }
  }
  Row failed = cell("mod", 4e15, 6);
  failed.status = "failed";
  failed.reason = "loss is NaN,\n\"again\"";
  failed.val_causal.reset();
  failed.val_topk.reset();
  failed.best_val.reset();
  failed.lr.reset();
  rows.push_back(failed);
  return rows;
}

TEST(SweepTable, ComesBackFromItsCsvToTheBit) {
  const std::vector<Row> rows = table();
  const std::vector<Row> again = read_csv(to_csv(rows), "table.csv");
  ASSERT_EQ(again.size(), rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) EXPECT_TRUE(again[i] == rows[i]) << rows[i].cell;
  EXPECT_TRUE(row_from_json(to_json(rows.back()), "row") == rows.back());
}

TEST(SweepTable, RefusesWhatIsNone) {
  EXPECT_THAT(message_of<UserError>([] { read_csv("", "x.csv"); }), HasSubstr("x.csv:1"));
  EXPECT_THAT(message_of<UserError>([] { read_csv("a,b\n1,2\n", "x.csv"); }),
              HasSubstr("column sweep is missing"));
  std::string csv = to_csv(table());
  EXPECT_THAT(message_of<UserError>([&] { read_csv(csv + "1,2\n", "x.csv"); }), HasSubstr("2 cells"));
  const std::size_t at = csv.find(",1e+15,");
  ASSERT_NE(at, std::string::npos);
  csv.replace(at, 7, ",many,");
  EXPECT_THAT(message_of<UserError>([&] { read_csv(csv, "x.csv"); }), HasSubstr("budget is 'many'"));
  EXPECT_THAT(message_of<UserError>([&] { read_csv(csv + "\"open", "x.csv"); }), HasSubstr("x.csv"));
  EXPECT_THROW(row_from_json("{", "row"), UserError);
}

TEST(SweepReport, ReproducesFromItsCsv) {
  const auto folder = fresh_folder();
  write_sweep_report(table(), {}, folder / "a.html");
  const std::vector<Row> rows = read_csv(read_file(folder / "a.csv"), "a.csv");
  write_sweep_report(rows, {}, folder / "b.html");
  EXPECT_EQ(read_file(folder / "a.csv"), read_file(folder / "b.csv"));
  // The figures' clip paths are numbered anew.
  const auto without_ids = [](std::string html) {
    for (std::size_t at = 0; (at = html.find("clip", at)) != std::string::npos; at += 4) {
      while (at + 4 < html.size() && html[at + 4] >= '0' && html[at + 4] <= '9') html.erase(at + 4, 1);
    }
    return html;
  };
  EXPECT_EQ(without_ids(read_file(folder / "a.html")), without_ids(read_file(folder / "b.html")));
}

TEST(SweepReport, ShowsCurvesClaimsAndFailures) {
  const auto folder = fresh_folder();
  write_sweep_report(table(), {}, folder / "a.html");
  const std::string html = read_file(folder / "a.html");
  for (const char* part :
       {"1e+15 training FLOPs", "The paper's claims", "not testable here", "Frontier against wall-clock",
        "Passes over the training text", "loss is NaN", "1 failed", "made, &quot;up&quot;"}) {
    EXPECT_THAT(html, HasSubstr(part));
  }
  for (const char* outside : {"http:", "https:", "src=", "<script", "<link", "\"nan", " nan"})
    EXPECT_THAT(html.substr(html.find("<body>")), Not(HasSubstr(outside)));
  EXPECT_THROW(write_sweep_report(table(), {}, folder / "a.csv"), UsageError);
}

}  // namespace
}  // namespace fathom::isoflop
