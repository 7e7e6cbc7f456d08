#include "train/report/report.h"

#include <limits>

#include <gmock/gmock.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "tests/train/fake_run.h"
#include "tests/train/html_checks.h"
#include "tests/train/test_folder.h"
#include "train/report/html.h"
#include "train/report/run_data.h"
#include "train/report/svg_chart.h"

namespace fathom {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::DoubleNear;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using testing_support::expect_no_bad_numbers;
using testing_support::expect_self_contained;
using testing_support::expect_well_formed;
using testing_support::fresh_folder;
using testing_support::message_of;
using testing_support::read_file;
using testing_support::write_fake_run;
using testing_support::write_file;

std::size_t count_of(const std::string& text, const std::string& part) {
  std::size_t count = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++count;
  return count;
}

TEST(Report, IsSelfContainedAndShowsBothRuns) {
  const fs::path folder = fresh_folder();
  write_fake_run(folder / "dense", {.final_loss = 3.42});
  write_fake_run(folder / "mod",
                 {.final_loss = 3.40, .tokens_per_s = 17000, .routed = true, .resumed = true});
  const std::vector<fs::path> runs{folder / "dense", folder / "mod"};
  write_report(runs, folder / "report.html");
  const std::string html = read_file(folder / "report.html");
  expect_well_formed(html);
  expect_no_bad_numbers(html);
  expect_self_contained(html);
  EXPECT_THAT(html, Not(HasSubstr("<script")));
  EXPECT_THAT(html, AllOf(HasSubstr("<title>dense and mod</title>"), HasSubstr("prefers-color-scheme: dark"),
                          HasSubstr("Training loss against training FLOPs"),
                          HasSubstr("Validation loss against wall-clock"),
                          HasSubstr("Realised capacity by layer"), HasSubstr("Where the FLOPs go"),
                          HasSubstr("kind: mod"), HasSubstr("What the models write"), HasSubstr("1 resume")));
  EXPECT_THAT(html, AllOf(HasSubstr("&lt;covering&gt;"), Not(HasSubstr("<covering>"))));
  EXPECT_LT(html.size(), 1'500'000u);
}

TEST(Report, ShowsHowExpertsShareTheTokens) {
  const fs::path folder = fresh_folder();
  write_fake_run(folder / "dense", {});
  write_fake_run(folder / "moe", {.experts = true});
  write_report(std::vector<fs::path>{folder / "dense", folder / "moe"}, folder / "report.html");
  const std::string html = read_file(folder / "report.html");
  expect_well_formed(html);
  expect_no_bad_numbers(html);
  EXPECT_THAT(html, AllOf(HasSubstr("<h2>Experts</h2>"), HasSubstr("Tokens without an expert, in training"),
                          HasSubstr("moe, dropped"), HasSubstr("moe, no-op"), HasSubstr("moe, idlest"),
                          HasSubstr("Experts under the causal rule"), HasSubstr("moe, recall"),
                          Not(HasSubstr("dense, idlest")), Not(HasSubstr("<h2>Routing</h2>"))));
  for (const char* cell :
       {"9.25 %", "3.12 %", "2.125", "0.250", "43.75 %", "1.812", "6.25 % to 53.12 %", "81.25 %"})
    EXPECT_THAT(html, HasSubstr(cell));
  EXPECT_EQ(count_of(html, "Experts by layer: "), 1u);
  write_report(std::vector<fs::path>{folder / "dense"}, folder / "dense.html");
  EXPECT_THAT(read_file(folder / "dense.html"), Not(HasSubstr("<h2>Experts</h2>")));
}

TEST(Report, WritesTheSameFiguresAsCsvAndJson) {
  const fs::path folder = fresh_folder();
  write_fake_run(folder / "dense, small", {.steps = 200});
  write_fake_run(folder / "mod", {.steps = 200, .routed = true, .ended = false});
  const std::vector<fs::path> runs{folder / "dense, small", folder / "mod"};
  write_report(runs, folder / "out.html");
  const std::string csv = read_file(folder / "out.csv");
  EXPECT_EQ(count_of(csv, "\r\n"), 3u);
  EXPECT_THAT(csv, AllOf(::testing::StartsWith("name,status,"), HasSubstr("\"dense, small\",done,200")));
  const auto json = nlohmann::json::parse(report_json(runs));
  const auto& dense = json.at("runs").at(0);
  const auto& mod = json.at("runs").at(1);
  EXPECT_EQ(dense.at("name"), "dense, small");
  EXPECT_TRUE(dense.at("val_topk").is_null());
  EXPECT_EQ(mod.at("status"), "unfinished");
  EXPECT_EQ(mod.at("realised_capacity").size(), 4u);
  EXPECT_NEAR(mod.at("gap").get<double>(),
              mod.at("val_causal").get<double>() - mod.at("val_topk").get<double>(), 1e-12);
  EXPECT_DOUBLE_EQ(dense.at("flops_total").get<double>(), 200 * 4096 * 6.1e6);
  EXPECT_NEAR(dense.at("passes").get<double>(), 200 * 4096 / 9e6, 1e-9);
  EXPECT_NEAR(dense.at("tokens_per_s").get<double>(), 15000, 600);
}

TEST(Report, SaysWhenFlopsDifferOrTextRepeats) {
  const fs::path folder = fresh_folder();
  write_fake_run(folder / "a", {.steps = 100});
  write_fake_run(folder / "b", {.steps = 150, .final_loss = 3.3});
  const std::vector<fs::path> runs{folder / "a", folder / "b"};
  write_report(runs, folder / "r.html");
  EXPECT_THAT(read_file(folder / "r.html"), HasSubstr("Training FLOPs differ by 50 %"));
}

TEST(Report, DoesNotRankLossesOfDifferentTokenizersOrTexts) {
  const fs::path folder = fresh_folder();
  write_fake_run(folder / "a", {.steps = 100});
  write_fake_run(folder / "b", {.steps = 100, .final_loss = 3.3});
  write_fake_run(folder / "bpe", {.steps = 100, .tokenizer_hash = "b9e"});
  write_fake_run(folder / "other text", {.steps = 100, .valid_source_hash = "7e47"});
  write_fake_run(folder / "older", {.steps = 100, .tokenizer_hash = "", .valid_source_hash = ""});
  const auto all_of = [&](std::vector<fs::path> runs) {
    write_report(runs, folder / "r.html");
    return read_file(folder / "r.html") + report_text(runs) + report_json(runs);
  };
  const std::string alike = all_of({folder / "a", folder / "b"});
  EXPECT_THAT(alike, AllOf(HasSubstr("Lowest validation loss"), HasSubstr("class=\"best\""),
                           Not(HasSubstr("do not compare")), Not(HasSubstr("\"warning\""))));
  EXPECT_THAT(all_of({folder / "a", folder / "older"}), Not(HasSubstr("do not compare")));
  const std::string tokenizers = all_of({folder / "a", folder / "bpe"});
  EXPECT_EQ(count_of(tokenizers, "different tokenizers"), 3u) << "page, table and JSON";
  EXPECT_THAT(tokenizers, AllOf(Not(HasSubstr("Lowest validation loss")), Not(HasSubstr("class=\"best\"")),
                                HasSubstr("\"warning\":")));
  EXPECT_EQ(count_of(all_of({folder / "a", folder / "other text"}), "different texts"), 3u);
}

TEST(Report, EscapesEverythingThatComesFromOutside) {
  const fs::path folder = fresh_folder();
  const std::string evil = "<script>alert('x')<&\"";
  const fs::path run = folder / "<b>&'run'";
  write_fake_run(run, {.steps = 100, .routed = true});
  write_file(run / "config.yaml", evil);
  write_file(run / "samples.json", nlohmann::json::array({{{"prompt", evil}, {"text", evil}}}).dump());
  write_file(run / "samples.txt", evil + "\xff\x01");
  write_file(run / "plan.json", nlohmann::json({{"breakdown", {{evil, 5.0}}}}).dump());
  {
    MetricsLog log(run / "metrics.jsonl", 100);
    EventRecord stop;
    stop.kind = EventKind::Stop;
    stop.message = evil;
    log.append(stop);
  }
  const std::vector<fs::path> runs{run};
  write_report(runs, folder / "r.html");
  const std::string html = read_file(folder / "r.html");
  EXPECT_EQ(html.find("<script"), std::string::npos);
  EXPECT_EQ(html.find("<b>&'"), std::string::npos);
  EXPECT_EQ(html.find('\xff'), std::string::npos);
  EXPECT_GE(count_of(html, "&lt;script&gt;"), 6u);
  expect_well_formed(html);
}

TEST(Report, CopesWithNaNsASinglePointAndNothingAtAll) {
  const fs::path folder = fresh_folder();
  write_fake_run(folder / "gaps", {.steps = 400, .nan_share = 0.3});
  write_fake_run(folder / "never finite",
                 {.steps = 60, .final_loss = std::numeric_limits<double>::quiet_NaN(), .nan_share = 1.0});
  write_fake_run(folder / "one", {.steps = 1, .log_every = 1, .routed = true});
  fs::create_directories(folder / "empty");
  write_file(folder / "empty" / "metrics.jsonl", "");
  for (const std::vector<fs::path>& runs :
       {std::vector<fs::path>{folder / "gaps"}, std::vector<fs::path>{folder / "never finite"},
        std::vector<fs::path>{folder / "one"}, std::vector<fs::path>{folder / "empty"},
        std::vector<fs::path>{folder / "gaps", folder / "never finite", folder / "one", folder / "empty"}}) {
    write_report(runs, folder / "r.html");
    const std::string html = read_file(folder / "r.html");
    expect_well_formed(html);
    expect_no_bad_numbers(html);
  }
  const std::vector<fs::path> empty{folder / "empty"};
  write_report(empty, folder / "r.html");
  EXPECT_THAT(read_file(folder / "r.html"), HasSubstr("no data"));
}

TEST(Report, EightRunsHaveEightColoursAndNamesThatDiffer) {
  const fs::path folder = fresh_folder();
  std::vector<fs::path> runs;
  for (int i = 0; i < 8; ++i) {
    runs.push_back(folder / ("sweep" + std::to_string(i)) / "run");
    write_fake_run(runs.back(), {.steps = 100, .seed = static_cast<unsigned>(i)});
  }
  write_report(runs, folder / "r.html");
  const std::string html = read_file(folder / "r.html");
  for (int i = 0; i < 8; ++i) {
    EXPECT_THAT(html, HasSubstr("swatch s" + std::to_string(i)));
    EXPECT_THAT(html, HasSubstr("sweep" + std::to_string(i) + "/run"));
  }
}

TEST(Report, AFolderThatIsNoRunIsAUserError) {
  const fs::path folder = fresh_folder();
  const auto report_of = [&](const fs::path& run) {
    return message_of<UserError>([&] {
      const std::vector<fs::path> runs{run};
      write_report(runs, folder / "r.html");
    });
  };
  fs::create_directories(folder / "other");
  EXPECT_THAT(report_of(folder / "other"), AllOf(HasSubstr("no run folder"), HasSubstr("metrics.jsonl")));
  EXPECT_THAT(report_of(folder / "absent"), HasSubstr("does not exist"));
  write_fake_run(folder / "run", {.steps = 20});
  write_file(folder / "run" / "plan.json", "[");
  EXPECT_THAT(report_of(folder / "run"), HasSubstr("plan.json"));
  EXPECT_FALSE(fs::exists(folder / "r.html"));
}

TEST(Report, AnUnwritableOrClashingFileIsAnError) {
  const fs::path folder = fresh_folder();
  write_fake_run(folder / "run", {.steps = 20});
  const std::vector<fs::path> runs{folder / "run"};
  EXPECT_THAT(message_of<UserError>([&] { write_report(runs, folder / "no" / "r.html"); }),
              HasSubstr("no/r.html"));
  EXPECT_THAT(message_of<UsageError>([&] { write_report(runs, folder / "r.csv"); }), HasSubstr(".html"));
}

TEST(Escape, KeepsUtf8AndReplacesTheRest) {
  EXPECT_EQ(report::escape("a<b>&\"'"), "a&lt;b&gt;&amp;&quot;&#39;");
  EXPECT_EQ(report::escape("Käse 漢 🙂\n"), "Käse 漢 🙂\n");
  EXPECT_EQ(report::escape("\xff"), "\xEF\xBF\xBD");
  EXPECT_EQ(report::escape("\xc0\xaf"), "\xEF\xBF\xBD\xEF\xBF\xBD");  // overlong
  EXPECT_EQ(report::escape("\xe6\xbc"), "\xEF\xBF\xBD\xEF\xBF\xBD");  // cut off
  EXPECT_EQ(report::escape(std::string("\x1b", 1)), "\xEF\xBF\xBD");
}

TEST(Chart, NiceTicks) {
  EXPECT_THAT(report::nice_ticks(0, 10, 5), ElementsAre(0, 2, 4, 6, 8, 10));
  EXPECT_THAT(report::nice_ticks(3.41, 3.59, 4),
              ElementsAre(DoubleNear(3.45, 1e-12), DoubleNear(3.5, 1e-12), DoubleNear(3.55, 1e-12)));
  EXPECT_TRUE(report::nice_ticks(1, 1, 5).empty());
}

TEST(Chart, ThinningKeepsTheExtremesAndTheGaps) {
  std::vector<report::Point> points;
  points.reserve(10000);
  for (int i = 0; i < 10000; ++i) points.push_back({static_cast<double>(i), std::sin(i * 0.001)});
  points[5003].y = 100.0;
  points[7001].y = -50.0;
  points[9000].y = std::nan("");
  const std::vector<report::Point> thin = report::thin_out(points, 400);
  EXPECT_LE(thin.size(), 402u);
  const auto has = [&](double x, double y) {
    return std::any_of(thin.begin(), thin.end(),
                       [&](const report::Point& p) { return p.x == x && p.y == y; });
  };
  EXPECT_TRUE(has(5003, 100.0));
  EXPECT_TRUE(has(7001, -50.0));
  EXPECT_TRUE(std::any_of(thin.begin(), thin.end(), [](const report::Point& p) { return std::isnan(p.y); }));
  EXPECT_TRUE(
      std::is_sorted(thin.begin(), thin.end(), [](const auto& a, const auto& b) { return a.x < b.x; }));
}

TEST(Chart, ANaNBreaksTheLine) {
  report::LineChart chart;
  const double nan = std::nan("");
  chart.series.push_back({"a",
                          0,
                          report::Stroke::Solid,
                          report::Marks::None,
                          {{0, 1}, {1, 2}, {2, nan}, {3, 2}, {4, 3}, {5, nan}, {6, 1}}});
  const std::string svg = report::render(chart);
  const std::size_t at = svg.find("<path class=\"line\" d=\"M", svg.find("</ul>"));
  ASSERT_NE(at, std::string::npos);
  const std::string path = svg.substr(at, svg.find("/>", at) - at);
  EXPECT_EQ(count_of(path, "M"), 3u);
  EXPECT_EQ(count_of(path, "L"), 2u);
  EXPECT_EQ(count_of(svg, "class=\"mark\""), 1u);  // the last point stands alone
}

TEST(Smooth, IsACentredMeanThatSkipsNaN) {
  const double nan = std::nan("");
  EXPECT_THAT(report::smooth({1, 2, 3, 4, 5}, 3), ElementsAre(1, 2, 3, 4, 4.5));
  EXPECT_THAT(report::smooth({0, 3, 0, 3, 0}, 3), ElementsAre(0, 1, 2, 1, 1.5));
  const std::vector<double> gap = report::smooth({1, nan, 3}, 3);
  EXPECT_EQ(gap[0], 1);
  EXPECT_TRUE(std::isnan(gap[1]));
  EXPECT_TRUE(report::smooth({}, 3).empty());
}

}  // namespace
}  // namespace fathom
