// The engine against the whole forward pass: whatever the schedule of requests, blocks and chunks, each row's
// logits are those of the text alone.
#include "infer/engine.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>

#include <fmt/format.h>
#include <gmock/gmock.h>

#include "infer/generate.h"
#include "kernels/error.h"
#include "tests/devices.h"
#include "tests/infer/tiny_models.h"

namespace fathom {
namespace {

using Ids = std::vector<std::int32_t>;
using ::testing::HasSubstr;

using namespace tiny_models;

constexpr std::int64_t kContext = 80;

struct Seen {
  Request request;
  Ids ids;  // the prompt, and what came
  std::map<std::int64_t, std::vector<float>> logits;
  std::vector<double> prompt_logprobs;
  Finish finish = Finish::None;
};

Ids random_ids(std::mt19937_64& r, std::int64_t n) {
  std::uniform_int_distribution<std::int32_t> any(0, static_cast<std::int32_t>(kVocab) - 1);
  Ids ids(static_cast<std::size_t>(n));
  for (std::int32_t& id : ids) id = any(r);
  return ids;
}

/// Requests that come, go and are cancelled at random; what was seen of those that ended well.
std::vector<Seen> run_schedule(Model& m, std::uint64_t seed, EngineStats& stats) {
  std::mt19937_64 r(seed), dial(seed + 1'000'003);
  const auto from_to = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(r);
  };
  EngineOptions o;
  o.rule = m.rule;
  o.cache.block = 16 * from_to(1, 4);
  o.max_rows = from_to(1, 40);
  o.max_sequences = from_to(1, 6);
  const std::int64_t block_bytes = KvCache::entry_bytes(m.c, m.model) * o.cache.block;
  // Enough for one text of the whole context, and for little more.
  const std::int64_t whole = (kContext + o.cache.block - 1) / o.cache.block + 1;
  o.cache.bytes = block_bytes * 4 * from_to(whole, whole + whole / 2);
  Engine engine(m.c, m.model, o);
  std::map<RequestId, Seen> open;
  std::vector<Seen> ended;
  engine.observe_logits([&](RequestId id, std::int64_t position, std::span<const float> logits) {
    open[id].logits[position].assign(logits.begin(), logits.end());
  });
  std::int64_t to_come = from_to(1, 7);
  while (to_come > 0 || !engine.idle()) {
    if (to_come > 0 && (engine.idle() || from_to(0, 2) == 0)) {
      Request q;
      q.max_tokens = from_to(0, 2) == 0 ? from_to(0, kContext) : from_to(0, 30);
      const std::int64_t most = kContext + (q.max_tokens == 0 ? 1 : 0);
      q.prompt = random_ids(r, from_to(0, 3) == 0 ? from_to(1, most) : from_to(1, 20));
      q.sampling.temperature = from_to(0, 1) == 0 ? 0.0 : 1.0;
      q.sampling.seed = static_cast<std::uint64_t>(from_to(0, 1000));
      q.sampling.repetition_penalty = from_to(0, 2) == 0 ? 1.3 : 1.0;
      q.prompt_logprobs = from_to(0, 3) == 0;
      if (dial() % 2 == 0) q.threshold = 0.4 + 0.05 * static_cast<double>(dial() % 5);
      Seen seen;
      seen.request = q;
      seen.ids = q.prompt;
      open[engine.submit(q)] = seen;
      --to_come;
    }
    if (!open.empty() && from_to(0, 30) == 0) {
      auto gone = open.begin();
      std::advance(gone, from_to(0, static_cast<std::int64_t>(open.size()) - 1));
      engine.cancel(gone->first);
      open.erase(gone);
    }
    for (const Event& e : engine.step()) {
      Seen& seen = open.at(e.request);
      if (e.has_token) seen.ids.push_back(e.token.id);
      seen.prompt_logprobs.insert(seen.prompt_logprobs.end(), e.prompt_logprobs.begin(),
                                  e.prompt_logprobs.end());
      seen.finish = e.finish;
      if (e.finish == Finish::Error) ADD_FAILURE() << e.error;
      if (e.finish == Finish::None) continue;
      ended.push_back(seen);
      open.erase(e.request);
    }
  }
  EXPECT_TRUE(open.empty());
  stats = engine.stats();
  EXPECT_EQ(stats.free_blocks, stats.blocks);
  return ended;
}

Causal rule_of(const Model& m, const Request& request) {
  Causal rule = m.rule;
  rule.threshold = request.threshold.value_or(rule.threshold);
  return rule;
}

std::int64_t schedules(std::int64_t usual) {
  const char* given = std::getenv("FATHOM_SCHEDULES");
  return given == nullptr ? usual : std::atoll(given);
}

class EngineSchedules : public ::testing::TestWithParam<Case> {};

void expect_the_bits_of_the_whole_pass(Model& m, std::int64_t count) {
  std::int64_t rows = 0, preemptions = 0;
  for (std::int64_t seed = 0; seed < count; ++seed) {
    SCOPED_TRACE(seed);
    EngineStats stats;
    for (const Seen& s : run_schedule(m, static_cast<std::uint64_t>(seed), stats)) {
      if (s.ids.size() > static_cast<std::size_t>(kContext)) continue;  // scored behind the context
      const std::vector<float> whole = causal_logits(m.c, m.model, s.ids, rule_of(m, s.request));
      for (const auto& [position, logits] : s.logits) {
        // NOLINTNEXTLINE(bugprone-suspicious-memory-comparison): to the bit
        ASSERT_EQ(std::memcmp(logits.data(), whole.data() + (position - 1) * kVocab, kVocab * sizeof(float)),
                  0)
            << "position " << position << " of " << s.ids.size();
        ++rows;
      }
      if (s.request.prompt_logprobs) {
        ASSERT_EQ(s.prompt_logprobs.size() + 1, s.request.prompt.size());
        for (std::size_t i = 1; i < s.request.prompt.size(); ++i) {
          const std::span<const float> row(whole.data() + (i - 1) * kVocab, kVocab);
          ASSERT_EQ(s.prompt_logprobs[i - 1], logprob_of(row, s.ids[i], 0));
        }
      }
      const auto new_tokens = static_cast<std::int64_t>(s.ids.size() - s.request.prompt.size());
      EXPECT_EQ(s.finish, Finish::Length);
      EXPECT_TRUE(new_tokens == s.request.max_tokens || static_cast<std::int64_t>(s.ids.size()) >= kContext);
    }
    preemptions += stats.preemptions;
    if (::testing::Test::HasFailure()) return;
  }
  EXPECT_GT(rows, 0);
  if (count >= 100) {
    EXPECT_GT(preemptions, 0) << "no schedule was short of blocks";
  }
}

TEST_P(EngineSchedules, GiveTheBitsOfTheWholePassInTheInvariantMode) {
  Model m(make_cpu_backend({.invariant = true}, 2), DType::F32, GetParam().routing);
  expect_the_bits_of_the_whole_pass(m, schedules(100));
}

// Keys and values of few bits: the whole pass reads what a cache would hold.
TEST_P(EngineSchedules, GiveThoseBitsWithCachesOfCodes) {
  Model m(make_cpu_backend({.invariant = true}, 2), DType::F32, GetParam().routing);
  std::vector<std::vector<float>> logits;
  for (const int bits : {16, 8, 4}) {
    SCOPED_TRACE(bits);
    m.model.set_kv_bits(bits);
    if (bits < 16) expect_the_bits_of_the_whole_pass(m, schedules(60));
    if (HasFailure()) return;
    logits.push_back(causal_logits(m.c, m.model, {1, 5, 22, 0, 7, 7, 3}, m.rule));
  }
  EXPECT_NE(logits[0], logits[1]);
  EXPECT_NE(logits[1], logits[2]);
}

TEST_P(EngineSchedules, AreCloseToTheWholePassInTheFastMode) {
  Model m(make_cpu_backend({}, 2), DType::F32, GetParam().routing);
  std::int64_t rows = 0, near = 0;
  for (std::int64_t seed = 0; seed < schedules(40); ++seed) {
    SCOPED_TRACE(seed);
    EngineStats stats;
    for (const Seen& s : run_schedule(m, static_cast<std::uint64_t>(seed), stats)) {
      const std::vector<float> whole = causal_logits(m.c, m.model, s.ids, rule_of(m, s.request));
      const std::vector<double> margin = margins(m, s.ids, rule_of(m, s.request));
      for (const auto& [position, logits] : s.logits) {
        if (margin[static_cast<std::size_t>(position - 1)] < 1e-4) {
          ++near;  // another rounding may route it otherwise
          continue;
        }
        const float* expected = whole.data() + (position - 1) * kVocab;
        double size = 0, error = 0;
        for (std::int64_t i = 0; i < kVocab; ++i) {
          size = std::max(size, std::fabs(static_cast<double>(expected[i])));
          error = std::max(error,
                           std::fabs(static_cast<double>(logits[static_cast<std::size_t>(i)]) - expected[i]));
        }
        ASSERT_LT(error, 1e-5 * size) << "position " << position;
        ++rows;
      }
    }
    if (HasFailure()) return;
  }
  EXPECT_GT(rows, 0);
  RecordProperty("near_the_threshold", static_cast<int>(near));
}

INSTANTIATE_TEST_SUITE_P(Kinds, EngineSchedules, ::testing::ValuesIn(cases()),
                         [](const auto& kind) { return kind.param.name; });

class CudaEngineSchedules : public ::testing::TestWithParam<Case> {};

TEST_P(CudaEngineSchedules, GiveTheBitsOfTheWholePassInTheInvariantMode) {
  const testing_support::OpenedDevice opened =
      testing_support::open_device(testing_support::Device::Cuda, {.invariant = true});
  testing_support::skip_without(opened);
  if (!opened.backend) return;
  for (const DType dtype : {DType::F32, DType::BF16}) {
    SCOPED_TRACE(name_of(dtype));
    Model m(opened.backend, dtype, GetParam().routing);
    for (const int bits : {16, 8, 4}) {
      SCOPED_TRACE(bits);
      m.model.set_kv_bits(bits);
      expect_the_bits_of_the_whole_pass(m, schedules(10));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, CudaEngineSchedules, ::testing::ValuesIn(cases()),
                         [](const auto& kind) { return kind.param.name; });

class EngineInput : public ::testing::Test {
 protected:
  EngineOptions options() {
    EngineOptions o;
    o.rule = m.rule;
    o.cache.block = 16;
    o.cache.bytes = 64 << 10;
    return o;
  }
  template <typename Call>
  std::string message_of(Call&& call) {
    try {
      call();
    } catch (const UserError& e) {
      return e.what();
    }
    ADD_FAILURE() << "no error";
    return "";
  }
  Model m{make_cpu_backend({}, 1), DType::F32, depth(CausalMethod::Predictor)};
};

TEST_F(EngineInput, IsRefusedInOneParagraphAndTheOthersGoOn) {
  Engine engine(m.c, m.model, options());
  const RequestId good = engine.submit({.prompt = {1, 2, 3}, .max_tokens = 5});
  const auto refused = [&](Request r) { return message_of([&] { engine.submit(std::move(r)); }); };
  EXPECT_THAT(refused({.prompt = {}}), HasSubstr("prompt is empty"));
  EXPECT_THAT(refused({.prompt = {1, 31}}), HasSubstr("Token 1 of the prompt is 31"));
  EXPECT_THAT(refused({.prompt = {-1}}), HasSubstr("vocabulary of 31"));
  EXPECT_THAT(refused({.prompt = Ids(81, 1)}), HasSubstr("81 tokens, and the model's context is 80"));
  EXPECT_THAT(refused({.prompt = {1}, .sampling = {.temperature = -1}}), HasSubstr("temperature"));
  EXPECT_THAT(refused({.prompt = {1}, .sampling = {.top_p = 1.5}}), HasSubstr("top_p"));
  EXPECT_THAT(refused({.prompt = {1}, .sampling = {.repetition_penalty = 0}}),
              HasSubstr("repetition_penalty"));
  EXPECT_THAT(refused({.prompt = {1}, .max_tokens = -1}), HasSubstr("max_tokens"));
  EXPECT_THAT(refused({.prompt = {1}, .threshold = 0}), HasSubstr("threshold"));
  EXPECT_THAT(refused({.prompt = {1}, .threshold = NAN}), HasSubstr("threshold"));
  SamplingOptions biased;
  biased.logit_bias[31] = 1;
  EXPECT_THAT(refused({.prompt = {1}, .sampling = biased}), HasSubstr("token 31"));
  biased.logit_bias = {{3, INFINITY}};
  EXPECT_THAT(refused({.prompt = {1}, .sampling = biased}), HasSubstr("logit_bias"));
  std::int64_t tokens = 0;
  while (!engine.idle()) {
    for (const Event& e : engine.step()) {
      EXPECT_EQ(e.request, good);
      tokens += e.has_token ? 1 : 0;
    }
  }
  EXPECT_EQ(tokens, 5);
}

TEST_F(EngineInput, ACacheTooSmallForAnythingIsRefused) {
  EngineOptions o = options();
  o.cache.bytes = 1000;
  EXPECT_THAT(message_of([&] { Engine(m.c, m.model, o); }), HasSubstr("holds no token of this model"));
  o.cache.block = 24;
  EXPECT_THAT(message_of([&] { Engine(m.c, m.model, o); }), HasSubstr("multiple of 16"));
}

// Whom a text shares the cache with never decides whether it ends: what finishes alone finishes in company,
// since a routed layer's blocks are of groups of its own text.
TEST_F(EngineInput, CompanyTakesNoRoomThatATextNeeds) {
  const std::int64_t block_bytes = 2 * 2 * 4 * 16 * 4, width = 2;
  for (std::int64_t groups = 6; groups <= 10; ++groups) {
    for (std::uint64_t seed = 0; seed < 40; ++seed) {
      SCOPED_TRACE(fmt::format("{} groups, seed {}", groups, seed));
      EngineOptions o = options();
      o.cache.bytes = groups * width * block_bytes;
      std::mt19937_64 r(seed);
      Request a{.prompt = random_ids(r, 16), .max_tokens = 64},
          b{.prompt = random_ids(r, 16), .max_tokens = 1};
      a.sampling.seed = seed;
      const auto finish_of = [&](const std::vector<Request>& all) {
        Engine engine(m.c, m.model, o);
        const RequestId first = engine.submit(all[0]);
        for (std::size_t i = 1; i < all.size(); ++i) engine.submit(all[i]);
        Finish finish = Finish::None;
        while (!engine.idle()) {
          for (const Event& e : engine.step()) {
            if (e.request == first && e.finish != Finish::None) finish = e.finish;
          }
        }
        EXPECT_EQ(engine.stats().free_blocks, engine.stats().blocks);
        return finish;
      };
      EXPECT_EQ(finish_of({a}), finish_of({a, b, b}));
    }
  }
}

// Twenty prompts on a cache for two of them: nobody begins who would have to go again.
TEST_F(EngineInput, NobodyIsComputedTwiceForWantOfPlanning) {
  Model dense(make_cpu_backend({}, 1), DType::F32, {});
  EngineOptions o;
  o.cache.block = 16;
  o.cache.bytes = 2 * 2 * 4 * 16 * 4 * 4 * 11;  // eleven groups of four blocks
  Engine engine(dense.c, dense.model, o);
  std::mt19937_64 r(1);
  for (int i = 0; i < 20; ++i) engine.submit({.prompt = random_ids(r, 60), .max_tokens = 16});
  while (!engine.idle()) engine.step();
  EXPECT_EQ(engine.stats().preemptions, 0);
  EXPECT_EQ(engine.stats().prompt_tokens, 20 * 60);
}

// All requests together need far more than there is: they wait for each other, and all of them end.
TEST_F(EngineInput, RequestsBeyondTheCacheWait) {
  EngineOptions o = options();
  o.cache.bytes = 16 * 2 * 2 * 4 * 4 * 4 * 7;  // a text of the whole context, and a little
  Engine engine(m.c, m.model, o);
  std::mt19937_64 r(1);
  std::map<RequestId, std::int64_t> tokens;
  for (int i = 0; i < 20; ++i) tokens[engine.submit({.prompt = random_ids(r, 30), .max_tokens = 40})] = 0;
  std::set<RequestId> ended;
  while (!engine.idle()) {
    for (const Event& e : engine.step()) {
      tokens[e.request] += e.has_token ? 1 : 0;
      ASSERT_NE(e.finish, Finish::Error) << e.error;
      if (e.finish == Finish::Length) ended.insert(e.request);
    }
  }
  EXPECT_EQ(ended.size(), 20U);
  for (const auto& [id, n] : tokens) EXPECT_EQ(n, 40) << id;
  EXPECT_EQ(engine.stats().free_blocks, engine.stats().blocks);
}

// FATHOM_REQUESTS=10000: the proof; by default as many as a test has time for.
TEST_F(EngineInput, CancellationsLeaveNoBlock) {
  EngineOptions o = options();
  o.max_rows = 24;
  Engine engine(m.c, m.model, o);
  std::mt19937_64 r(2);
  const auto from_to = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(r);
  };
  const char* given = std::getenv("FATHOM_REQUESTS");
  const std::int64_t count = given == nullptr ? 1000 : std::atoll(given);
  std::set<RequestId> open;
  std::int64_t submitted = 0, cancelled = 0, ended = 0;
  while (submitted < count || !engine.idle()) {
    for (std::int64_t i = from_to(0, 3); i > 0 && submitted < count; --i, ++submitted) {
      Request q;
      q.prompt = random_ids(r, from_to(1, 40));
      q.max_tokens = from_to(0, 12);
      open.insert(engine.submit(q));
    }
    while (!open.empty() && from_to(0, 2) == 0) {
      auto gone = open.begin();
      std::advance(gone, from_to(0, static_cast<std::int64_t>(open.size()) - 1));
      engine.cancel(*gone);
      open.erase(gone);
      ++cancelled;
    }
    for (const Event& e : engine.step()) {
      ASSERT_TRUE(open.contains(e.request)) << "an event of a request that is gone";
      if (e.finish == Finish::None) continue;
      open.erase(e.request);
      ++ended;
    }
  }
  EXPECT_TRUE(open.empty());
  EXPECT_EQ(cancelled + ended, count);
  EXPECT_GT(cancelled, count / 10);
  EXPECT_GT(ended, count / 10);
  EXPECT_EQ(engine.stats().free_blocks, engine.stats().blocks);
}

TEST_F(EngineInput, LogitsThatAreNotFiniteEndTheirRequestOnly) {
  const Tensor& head = m.model.parameters().get("lm_head.weight");
  const std::vector<double> whole = to_doubles(m.c.backend(), head);
  std::vector<double> broken = whole;
  broken[5] = NAN;
  Engine engine(m.c, m.model, options());
  from_doubles(m.c.backend(), head, broken);
  engine.submit({.prompt = {1, 2}, .max_tokens = 5});
  std::vector<Event> events = engine.step();
  ASSERT_EQ(events.size(), 1U);
  EXPECT_EQ(events[0].finish, Finish::Error);
  EXPECT_THAT(events[0].error, HasSubstr("not finite"));
  from_doubles(m.c.backend(), head, whole);
  engine.submit({.prompt = {1, 2}, .max_tokens = 1});
  events = engine.step();
  ASSERT_EQ(events.size(), 1U);
  EXPECT_EQ(events[0].finish, Finish::Length);
  EXPECT_EQ(engine.stats().free_blocks, engine.stats().blocks);
}

// The dial: less is computed the higher it stands, and in company as alone.
TEST_F(EngineInput, ThresholdsSayHowMuchOfATextIsComputed) {
  std::mt19937_64 r(3);
  const Ids prompt = random_ids(r, 40);
  const auto fractions_of = [&](const std::vector<double>& thresholds) {
    Engine engine(m.c, m.model, options());
    std::map<RequestId, double> of;
    for (const double t : thresholds)
      of[engine.submit({.prompt = prompt, .max_tokens = 1, .threshold = t})] = -1;
    while (!engine.idle()) {
      for (const Event& e : engine.step()) {
        if (e.finish != Finish::None) of[e.request] = e.routed_fraction.at(0);
      }
    }
    std::vector<double> fractions;
    for (const auto& [id, fraction] : of) fractions.push_back(fraction);
    return fractions;
  };
  const std::vector<double> together = fractions_of({0.001, 0.3, 0.5, 0.7, 0.999});
  EXPECT_EQ(together.front(), 1);
  EXPECT_EQ(together.back(), 0);
  EXPECT_TRUE(std::is_sorted(together.rbegin(), together.rend()));
  EXPECT_EQ(together[2], fractions_of({0.5})[0]);
  EXPECT_LT(together[3], together[1]);
}

TEST_F(EngineInput, BiasesThatLeaveNothingEndTheirRequest) {
  Engine engine(m.c, m.model, options());
  SamplingOptions none;
  for (std::int32_t id = 0; id < kVocab; ++id) none.logit_bias[id] = -INFINITY;
  engine.submit({.prompt = {1, 2}, .max_tokens = 9, .sampling = none});
  const std::vector<Event> events = engine.step();
  ASSERT_EQ(events.size(), 1U);
  EXPECT_THAT(events[0].error, HasSubstr("leave no token"));
}

TEST_F(EngineInput, AStoppedTextSaysWhatItComputed) {
  Engine engine(m.c, m.model, options());
  const RequestId id = engine.submit({.prompt = {1, 2, 3}, .max_tokens = 9});
  engine.step();
  const Event e = engine.stop(id);
  EXPECT_EQ(e.finish, Finish::Stop);
  EXPECT_EQ(e.routed_fraction.size(), 2U);
  EXPECT_TRUE(engine.idle());
  EXPECT_EQ(engine.stats().free_blocks, engine.stats().blocks);
}

TEST_F(EngineInput, StopTokensEndATextAndAreNotPartOfIt) {
  Engine engine(m.c, m.model, options());
  SamplingOptions always;
  always.temperature = 0;
  always.logit_bias[7] = 1e6;
  engine.submit({.prompt = {1, 2}, .max_tokens = 9, .stop_tokens = {7}, .sampling = always});
  const std::vector<Event> events = engine.step();
  ASSERT_EQ(events.size(), 1U);
  EXPECT_FALSE(events[0].has_token);
  EXPECT_EQ(events[0].finish, Finish::Stop);
}

/// Of one text, whose passes fail as a mistake of the program would.
class MistakenCycles final : public Cycles {
 public:
  std::int64_t most_texts() const override { return 4; }
  bool takes(RequestId id, const Request& /*request*/) override { return id == mistaken; }
  bool watches() const override { return false; }
  bool cycle(const CycleText& /*text*/, Cycle& /*result*/) override {
    throw InternalError("[cycles] mistaken");
  }
  bool give_up() override { return false; }
  void leave(RequestId /*id*/) override {}
  void end(RequestId /*id*/) override {}
  CycleStats stats() const override { return {}; }
  RequestId mistaken = 0;
};

TEST_F(EngineInput, WhatGoesWrongInOneTextsCycleEndsNoOther) {
  Engine engine(m.c, m.model, options());
  MistakenCycles cycles;
  engine.go_by(&cycles);
  cycles.mistaken = engine.submit({.prompt = {1, 2, 3}, .max_tokens = 20});
  const RequestId other = engine.submit({.prompt = {1, 2, 3}, .max_tokens = 20});
  std::int64_t tokens = 0;
  std::string error;
  while (!engine.idle()) {
    for (const Event& e : engine.step()) {
      if (e.request == other) tokens += e.has_token ? 1 : 0;
      if (e.request == cycles.mistaken && e.finish == Finish::Error) error = e.error;
    }
  }
  EXPECT_THAT(error, HasSubstr("mistaken"));
  EXPECT_EQ(tokens, 20);
  EXPECT_EQ(engine.stats().free_blocks, engine.stats().blocks);
}

}  // namespace
}  // namespace fathom
