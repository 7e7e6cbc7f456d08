#include "train/metrics/metrics_log.h"

#include <csignal>
#include <limits>

#include <gmock/gmock.h>
#include <nlohmann/json.hpp>
#include <sys/resource.h>

#include "kernels/error.h"
#include "tests/train/test_folder.h"

namespace fathom {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing_support::fresh_folder;
using testing_support::message_of;
using testing_support::read_file;
using testing_support::write_file;

StepRecord step_at(std::int64_t step) {
  StepRecord r;
  r.step = step;
  r.tokens = step * 2048;
  r.flops = 1e9 * static_cast<double>(step);
  r.loss = 5.0 - 0.01 * static_cast<double>(step);
  r.lr = 1e-3;
  r.grad_norm = 0.5;
  r.tokens_per_s = 1234.5;
  r.seconds = static_cast<double>(step);
  return r;
}

EvalRecord eval_at(std::int64_t step) {
  EvalRecord r;
  r.step = step;
  r.val_topk = 4.0;
  r.val_causal = 4.01;
  r.routed_layers = {1, 3};
  r.realised_capacity = {0.124, 0.131};
  r.router_recall = 0.9;
  return r;
}

std::vector<std::int64_t> steps_of(const Metrics& m) {
  std::vector<std::int64_t> out;
  for (const StepRecord& r : m.steps) out.push_back(r.step);
  return out;
}

TEST(Record, HasTheContractsKeys) {
  StepRecord step = step_at(3);
  step.mfu = 0.4;
  step.memory_held_bytes = 3e8;
  step.routed_layers = {1};
  step.routed_fraction = {0.125};
  const json s = json::parse(to_json_line(step));
  for (const char* key : {"step", "tokens", "flops", "loss", "lr", "grad_norm", "tokens_per_s", "mfu",
                          "seconds", "routed_fraction", "memory_held_bytes"}) {
    EXPECT_TRUE(s.contains(key)) << key;
  }
  EXPECT_FALSE(s.contains("aux_loss"));
  EXPECT_FALSE(s.contains("device_used_bytes")) << "unknown on a CPU";
  EvalRecord dense;
  dense.val_loss = 3.5;
  EXPECT_EQ(json::parse(to_json_line(dense)).at("val_loss"), 3.5);
  EXPECT_FALSE(json::parse(to_json_line(dense)).contains("val_topk"));
  EvalRecord routed = eval_at(7);
  routed.router_precision = 0.8;
  const json e = json::parse(to_json_line(routed));
  for (const char* key :
       {"step", "val_topk", "val_causal", "realised_capacity", "router_recall", "router_precision"}) {
    EXPECT_TRUE(e.contains(key)) << key;
  }
  EXPECT_FALSE(e.contains("val_loss"));
  EventRecord end;
  end.kind = EventKind::End;
  end.status = RunStatus::Done;
  end.step = 10;
  const json d = json::parse(to_json_line(end));
  EXPECT_EQ(d.at("event"), "end");
  EXPECT_EQ(d.at("status"), "done");
  EXPECT_EQ(d.at("steps"), 10);
  EXPECT_TRUE(d.contains("seconds"));
}

TEST(Record, WritesNonFiniteNumbersAsNullAndReadsThemAsNaN) {
  StepRecord r = step_at(1);
  r.loss = std::nan("");
  r.grad_norm = std::numeric_limits<double>::infinity();
  r.aux_loss = -std::numeric_limits<double>::infinity();
  r.routed_layers = {1, 3};
  r.routed_fraction = {0.5, std::nan("")};
  const std::string line = to_json_line(r);
  EXPECT_TRUE(json::accept(line)) << line;
  EXPECT_TRUE(json::parse(line).at("loss").is_null());
  const AnyRecord any = parse_record(line);
  const StepRecord back = std::get<StepRecord>(any);
  EXPECT_TRUE(std::isnan(back.loss));
  EXPECT_TRUE(std::isnan(back.grad_norm));
  ASSERT_TRUE(back.aux_loss.has_value());
  EXPECT_TRUE(std::isnan(*back.aux_loss));
  EXPECT_EQ(back.routed_fraction[0], 0.5);
  EXPECT_TRUE(std::isnan(back.routed_fraction[1]));
}

TEST(Record, SurvivesARoundTripToTheLastBit) {
  StepRecord r = step_at(7);
  r.loss = 0.1 + 0.2;
  r.flops = 6.02214076e18;
  r.loss_average = 1.0 / 3.0;
  r.predictor_accuracy = 0.93;
  r.router = {{0.1, -3.0, 2.0, 0.125}, {0.2, -4.0, 5.0, 0.25}};
  r.routed_layers = {1, 3};
  const StepRecord back = std::get<StepRecord>(parse_record(to_json_line(r)));
  EXPECT_EQ(back.loss, r.loss);
  EXPECT_EQ(back.flops, r.flops);
  EXPECT_EQ(back.loss_average, r.loss_average);
  EXPECT_EQ(back.predictor_accuracy, r.predictor_accuracy);
  ASSERT_EQ(back.router.size(), 2u);
  EXPECT_EQ(back.router[1].max, 5.0);
  EXPECT_EQ(back.router[1].above_half, 0.25);

  EventRecord start;
  start.kind = EventKind::Start;
  start.facts = RunFacts{};
  start.facts->params_total = 123;
  start.facts->seed = std::numeric_limits<std::uint64_t>::max();
  start.facts->capacity = 0.125;
  start.facts->routed_layers = {1, 3};
  start.message = "a \"quoted\" path\nwith a newline and \xff";
  const std::string line = to_json_line(start);
  EXPECT_EQ(line.find('\n'), std::string::npos);
  const EventRecord event = std::get<EventRecord>(parse_record(line));
  EXPECT_EQ(event.facts->params_total, 123);
  EXPECT_EQ(event.facts->seed, std::numeric_limits<std::uint64_t>::max());
  EXPECT_EQ(event.facts->capacity, 0.125);
  EXPECT_THAT(event.facts->routed_layers, ElementsAre(1, 3));
  EXPECT_THAT(event.message, HasSubstr("\"quoted\""));
}

TEST(Record, RejectsAValueOfTheWrongTypeByName) {
  EXPECT_THAT(message_of<UserError>([] { parse_record(R"({"step": "x", "loss": 1})"); }),
              ::testing::AllOf(HasSubstr("step"), HasSubstr("integer")));
  EXPECT_THAT(message_of<UserError>([] { parse_record(R"({"step": 1, "loss": []})"); }), HasSubstr("loss"));
  EXPECT_THAT(message_of<UserError>([] { parse_record("[1]"); }), HasSubstr("object"));
}

TEST(MetricsLog, AppendsWholeLinesAndReadsThemBack) {
  const auto path = fresh_folder() / "metrics.jsonl";
  {
    MetricsLog log(path);
    EventRecord start;
    log.append(start);
    log.append(step_at(1));
    log.append(eval_at(1));
    log.sync();
  }
  const Metrics m = read_metrics(path);
  EXPECT_THAT(steps_of(m), ElementsAre(1));
  ASSERT_EQ(m.evals.size(), 1u);
  EXPECT_THAT(m.evals[0].realised_capacity, ElementsAre(0.124, 0.131));
  ASSERT_EQ(m.events.size(), 1u);
  EXPECT_THAT(m.events[0].time, ::testing::MatchesRegex("....-..-..T..:..:..Z"));
  EXPECT_FALSE(m.torn_last_line);
}

TEST(MetricsLog, ResumeDropsWhatCameAfterTheStepAndKeepsEvents) {
  const auto path = fresh_folder() / "metrics.jsonl";
  {
    MetricsLog log(path);
    for (int step = 1; step <= 5; ++step) {
      log.append(step_at(step));
      if (step % 2 == 0) log.append(eval_at(step));
    }
    EventRecord checkpoint;
    checkpoint.kind = EventKind::Checkpoint;
    checkpoint.step = 5;
    log.append(checkpoint);
  }
  {
    MetricsLog log(path, 3);
    log.append(step_at(4));
  }
  const Metrics m = read_metrics(path);
  EXPECT_THAT(steps_of(m), ElementsAre(1, 2, 3, 4));
  ASSERT_EQ(m.evals.size(), 1u);
  EXPECT_EQ(m.evals[0].step, 2);
  ASSERT_EQ(m.events.size(), 1u);
  EXPECT_EQ(m.events[0].step, 5);
}

TEST(MetricsLog, ResumeKeepsLinesAsTheyAre) {
  const auto path = fresh_folder() / "metrics.jsonl";
  const std::string mine = R"({"loss":1.0,"step":1,"my_key":[1,2]})"
                           "\n"
                           R"({"note":"of a later version"})"
                           "\n";
  write_file(path, mine + R"({"loss":1.0,"step":2})" + "\n");
  MetricsLog log(path, 1);
  EXPECT_EQ(read_file(path), mine);
}

// Whatever byte the writer was killed at, the rest of the history is read, and the next line is a line of its
// own.
TEST(MetricsLog, ToleratesATornLastLineAtEveryByte) {
  const auto path = fresh_folder() / "metrics.jsonl";
  const std::string first = to_json_line(step_at(1)) + "\n";
  const std::string second = to_json_line(step_at(2)) + "\n";
  for (std::size_t cut = 0; cut <= second.size(); ++cut) {
    write_file(path, first + second.substr(0, cut));
    const Metrics torn = read_metrics(path);
    const bool whole = cut + 1 >= second.size();  // all of the object, with or without its newline
    EXPECT_EQ(torn.steps.size(), whole ? 2u : 1u) << cut;
    EXPECT_EQ(torn.torn_last_line, !whole && cut > 0) << cut;
    {
      MetricsLog log(path, 1);
      log.append(step_at(2));
    }
    EXPECT_EQ(read_file(path), first + second) << cut;
  }
}

TEST(MetricsLog, NamesABadLineElsewhere) {
  const auto path = fresh_folder() / "metrics.jsonl";
  write_file(path, to_json_line(step_at(1)) + "\n{\"step\": \n" + to_json_line(step_at(2)) + "\n");
  EXPECT_THAT(message_of<UserError>([&] { read_metrics(path); }),
              ::testing::AllOf(HasSubstr("line 2"), HasSubstr(path.string())));
  EXPECT_THAT(message_of<UserError>([&] { MetricsLog log(path, 1); }), HasSubstr("line 2"));
}

TEST(MetricsLog, AFullDiskIsAUserErrorWithThePathAndLeavesNoHalfLine) {
  const auto path = fresh_folder() / "metrics.jsonl";
  MetricsLog log(path);
  log.append(step_at(1));
  const std::string before = read_file(path);
  // A limit on the file's size fails a write in the middle of a line, as a full disk does.
  rlimit old{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto previous = std::signal(SIGXFSZ, SIG_IGN);
  rlimit tight = old;
  tight.rlim_cur = before.size() + 20;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &tight), 0);
  const std::string message = message_of<UserError>([&] { log.append(step_at(2)); });
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &old), 0);
  std::signal(SIGXFSZ, previous);
  EXPECT_THAT(message, HasSubstr(path.string()));
  EXPECT_EQ(read_file(path), before);
  log.append(step_at(2));
  EXPECT_THAT(steps_of(read_metrics(path)), ElementsAre(1, 2));
}

TEST(MetricsLog, AnUnwritablePathIsAUserError) {
  const auto folder = fresh_folder();
  EXPECT_THAT(message_of<UserError>([&] { MetricsLog log(folder / "absent" / "metrics.jsonl"); }),
              HasSubstr("absent"));
  EXPECT_THAT(message_of<UserError>([&] { MetricsLog log(folder); }), HasSubstr("folder"));
  EXPECT_THAT(message_of<UserError>([&] { read_metrics(folder / "absent.jsonl"); }),
              HasSubstr("absent.jsonl"));
}

}  // namespace
}  // namespace fathom
