#include "train/metrics/console.h"

#include <algorithm>
#include <sstream>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "src/core/units.h"

namespace fathom {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(Format, NumbersHaveUnits) {
  EXPECT_EQ(format_count(950), "950");
  EXPECT_EQ(format_count(12345), "12.3k");
  EXPECT_EQ(format_count(999'600), "1.00M");
  EXPECT_EQ(format_count(0.5), "0.50");
  EXPECT_EQ(format_flops(1.2e12), "1.20 TFLOP");
  EXPECT_EQ(format_rate(1.03e11), "103 GFLOP/s");
  EXPECT_EQ(format_bytes(512), "512 B");
  EXPECT_EQ(format_bytes(812.0 * 1024 * 1024), "812 MiB");
  EXPECT_EQ(format_bytes(1.5 * 1024 * 1024 * 1024), "1.5 GiB");
  EXPECT_EQ(format_duration(4.25), "4.2 s");
  EXPECT_EQ(format_duration(59.9), "1 min 00 s");
  EXPECT_EQ(format_duration(185), "3 min 05 s");
  EXPECT_EQ(format_duration(7620), "2 h 07 min");
  EXPECT_EQ(format_duration(3.0 * 86400 + 4 * 3600), "3 d 04 h");
  EXPECT_EQ(format_duration(std::nan("")), "?");
  EXPECT_EQ(format_percent(0.125), "12.5 %");
  EXPECT_EQ(with_commas(999), "999");
  EXPECT_EQ(with_commas(1234567), "1,234,567");
  EXPECT_EQ(with_commas(-123456), "-123,456");
}

StepRecord step_at(std::int64_t step) {
  StepRecord r;
  r.step = step;
  r.tokens = step * 2048;
  r.loss = 3.25;
  r.loss_average = 3.5;
  r.lr = 9.5e-4;
  r.grad_norm = 0.8312;
  r.tokens_per_s = 20480;  // 10 steps a second
  r.flops_per_s = 1.03e11;
  return r;
}

StepRecord routed_step_at(std::int64_t step) {
  StepRecord r = step_at(step);
  r.mfu = 0.61;
  r.routed_layers = {1, 3};
  r.routed_fraction = {0.12, 0.13};
  r.predictor_accuracy = 0.931;
  r.memory_bytes = 812.0 * 1024 * 1024;
  return r;
}

TEST(Format, AStepSaysEverything) {
  const StepRecord r = routed_step_at(1200);
  const std::string text = format_step(r, 5000);
  for (const char* part : {"step 1200/5000", "loss 3.2500 (avg 3.5000)", "ETA 6 min 20 s", "20.5k tok/s",
                           "103 GFLOP/s", "MFU 61.0 %", "lr 9.50e-04", "grad norm 0.831", "routed 12.5 %",
                           "predictor 93.1 %", "memory 812 MiB"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
}

TEST(Format, ADenseStepSaysNothingOfRouting) {
  EXPECT_THAT(format_step(step_at(5000), 5000),
              AllOf(Not(HasSubstr("routed")), Not(HasSubstr("ETA")), Not(HasSubstr("MFU"))));
}

TEST(Format, AnEvaluationShowsBothLossesAndTheGap) {
  EvalRecord r;
  r.step = 100;
  r.val_topk = 3.21;
  r.val_causal = 3.2125;
  r.realised_capacity = {0.121, 0.13};
  EXPECT_THAT(format_evaluation(r), AllOf(HasSubstr("top-k 3.2100"), HasSubstr("causal 3.2125"),
                                          HasSubstr("gap +0.0025"), HasSubstr("12.1 13.0 %")));
  EvalRecord dense;
  dense.val_loss = 3.0;
  EXPECT_THAT(format_evaluation(dense), AllOf(HasSubstr("val loss 3.0000"), Not(HasSubstr("causal"))));
}

TEST(Format, AStartSaysWhereItComputes) {
  EventRecord r;
  EXPECT_EQ(format_event(r), "start at step 0, 0.0 s");
  r.facts.emplace().device = "CPU, AVX2, 2 threads";
  EXPECT_EQ(format_event(r), "start at step 0, 0.0 s, on CPU, AVX2, 2 threads");
  r.kind = EventKind::Resume;
  r.step = 7;
  r.checkpoint = "step_00000007.h5";
  EXPECT_EQ(format_event(r), "resume at step 7, 0.0 s, on CPU, AVX2, 2 threads: step_00000007.h5");
}

TEST(Format, CutCountsCharactersNotBytes) {
  EXPECT_EQ(cut_to_width("abc", 3), "abc");
  EXPECT_EQ(cut_to_width("abcd", 3), "ab…");
  EXPECT_EQ(cut_to_width("äöüß", 4), "äöüß");
  EXPECT_EQ(cut_to_width("äöüßé", 4), "äöü…");
  EXPECT_EQ(cut_to_width("abc", 0), "");
}

TEST(Format, ALiveLineHasWholeFieldsByImportanceAsFarAsTheyFit) {
  const StepRecord r = routed_step_at(12000);
  const std::string narrow = "12000/50000  loss 3.2500  ETA 1h03m  20.5k tok/s  grad 0.831  routed 12.5 %";
  EXPECT_EQ(format_live_step(r, 50000, 79), narrow);  // a terminal of 80 columns
  EXPECT_EQ(format_live_step(r, 50000, 99), narrow + "  lr 9.50e-04");
  EXPECT_EQ(format_live_step(r, 50000, 119), narrow + "  lr 9.50e-04  MFU 61.0 %  avg 3.5000");
  EXPECT_EQ(format_live_step(r, 50000, 300), narrow +
                                                 "  lr 9.50e-04  MFU 61.0 %  avg 3.5000"
                                                 "  memory 812 MiB  predictor 93.1 %  103 GFLOP/s");
  // A dense model has room for more, and what is too long makes way for what is not.
  EXPECT_EQ(format_live_step(step_at(12000), 50000, 79),
            "12000/50000  loss 3.2500  ETA 1h03m  20.5k tok/s  grad 0.831  lr 9.50e-04");
  StepRecord slow = r;
  slow.tokens_per_s = 1234.5e6;
  slow.grad_norm = 1.23e-05;
  for (int width = 24; width < 200; ++width) {
    const std::string line = format_live_step(slow, 50000, width);
    ASSERT_LE(static_cast<int>(line.size()), width);
    for (std::size_t at = 0; at < line.size();) {
      const std::size_t end = std::min(line.find("  ", at), line.size());
      EXPECT_THAT(" " + format_live_step(slow, 50000, 300) + " ",
                  HasSubstr(" " + line.substr(at, end - at) + " "));
      at = end + 2;
    }
  }
}

TEST(Format, ALiveLineCutsOnlyWhenNothingElseIsLeft) {
  EXPECT_EQ(format_live_step(step_at(12000), 50000, 8), "12000/5…");
  EXPECT_EQ(format_live_step(step_at(12000), 0, 10), "step 12000");
}

TEST(Console, ATerminalGetsOneLiveLineCutToItsWidth) {
  std::ostringstream out;
  double now = 0.0;
  Console console(out, {.kind = ConsoleKind::Terminal,
                        .total_steps = 5000,
                        .width = [] { return 40; },
                        .clock = [&] { return now; }});
  console.step(step_at(1));
  now = 0.01;
  console.step(step_at(2));  // too soon to repaint
  now = 1.0;
  console.step(step_at(3));
  const std::string live = out.str();
  EXPECT_EQ(live.find('\n'), std::string::npos);
  EXPECT_EQ(std::count(live.begin(), live.end(), '\r'), 2);
  EXPECT_THAT(live, AllOf(HasSubstr("\r1/5000"), HasSubstr("\r3/5000"), Not(HasSubstr("2/5000"))));
  EvalRecord eval;
  eval.val_loss = 3.0;
  console.evaluation(eval);
  EXPECT_THAT(out.str().substr(live.size()), ::testing::StartsWith("\r\x1b[Kevaluation"));
  console.finish();
  EXPECT_EQ(out.str().back(), '\n');
}

TEST(Console, APipeGetsFewPlainLines) {
  std::ostringstream out;
  double now = 0.0;
  Console console(out, {.kind = ConsoleKind::Pipe, .total_steps = 1000, .clock = [&] { return now; }});
  for (int step = 1; step <= 1000; ++step) {
    now += 0.01;
    console.step(step_at(step));
  }
  const std::string text = out.str();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 11);  // the first step and every tenth of the run
  EXPECT_EQ(text.find('\r'), std::string::npos);
  EXPECT_EQ(text.find('\x1b'), std::string::npos);
  EXPECT_THAT(text, AllOf(HasSubstr("step 1/1000"), HasSubstr("step 100/1000"), HasSubstr("step 1000/1000")));
}

TEST(Console, ASlowRunInAPipeSpeaksEveryHalfMinute) {
  std::ostringstream out;
  double now = 0.0;
  Console console(out, {.kind = ConsoleKind::Pipe, .total_steps = 100000, .clock = [&] { return now; }});
  for (int step = 1; step <= 13; ++step) {
    console.step(step_at(step));
    now += 10.0;
  }
  const std::string text = out.str();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 5);  // at 0, 30, 60, 90 and 120 seconds
}

}  // namespace
}  // namespace fathom
