// Texts that begin alike: what they share changes nothing of them, and nothing of it is lost.
#include "infer/prefix_cache.h"

#include <cstdlib>
#include <map>
#include <random>
#include <set>

#include <fmt/format.h>
#include <gmock/gmock.h>

#include "infer/engine.h"
#include "kernels/error.h"
#include "tests/devices.h"
#include "tests/infer/tiny_models.h"

namespace fathom {
namespace {

using Ids = std::vector<std::int32_t>;

using namespace tiny_models;

TEST(BlockPools, CountWhoUsesAndWhoKeepsAGroup) {
  BlockPool pool(3, 2);
  const std::int32_t a = pool.take(), b = pool.take();
  pool.share(a);
  pool.keep(a);
  pool.keep(a);
  pool.give(a);
  EXPECT_EQ(pool.idle_groups(), 0);
  pool.give(a);
  EXPECT_TRUE(pool.is_idle(a));
  EXPECT_EQ(pool.free_groups(), 1);
  EXPECT_EQ(pool.available_groups(), 2);
  pool.share(a);
  EXPECT_EQ(pool.idle_groups(), 0);
  pool.give(a);
  pool.drop(a);
  EXPECT_EQ(pool.idle_blocks(), 2);
  pool.drop(a);
  EXPECT_EQ(pool.idle_groups(), 0);
  EXPECT_EQ(pool.free_groups(), 2);
  pool.give(b);
  EXPECT_EQ(pool.free_groups(), 3);
  EXPECT_THROW(pool.give(b), InternalError);
}

/// What came of a request.
struct Answer {
  Ids ids;  // that were chosen
  std::vector<double> logprobs, prompt_logprobs, routed_fraction;
  std::int64_t cached = 0;
  bool operator==(const Answer& o) const {
    return ids == o.ids && logprobs == o.logprobs && prompt_logprobs == o.prompt_logprobs &&
           routed_fraction == o.routed_fraction;
  }
};

void add(Answer& answer, const Event& e) {
  if (e.has_token) {
    answer.ids.push_back(e.token.id);
    answer.logprobs.push_back(e.token.logprob);
  }
  answer.prompt_logprobs.insert(answer.prompt_logprobs.end(), e.prompt_logprobs.begin(),
                                e.prompt_logprobs.end());
  EXPECT_NE(e.finish, Finish::Error) << e.error;
  if (e.finish == Finish::None) return;
  answer.routed_fraction = e.routed_fraction;
  answer.cached = e.cached_tokens;
}

Answer run_alone(Engine& engine, const Request& request) {
  Answer answer;
  engine.submit(request);
  while (!engine.idle()) {
    for (const Event& e : engine.step()) add(answer, e);
  }
  return answer;
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : r_(seed) {}
  std::int64_t from_to(std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(r_);
  }
  Ids ids(std::int64_t n) {
    Ids all(static_cast<std::size_t>(n));
    for (std::int32_t& id : all) id = static_cast<std::int32_t>(from_to(0, kVocab - 1));
    return all;
  }

 private:
  std::mt19937_64 r_;
};

constexpr std::int64_t kContext = 160;

struct Sizes {
  std::int64_t block, rows, sequences, groups;  // of a block for each of the four layers
};

EngineOptions options_of(Model& m, const Sizes& s, bool prefix_cache) {
  EngineOptions o;
  o.rule = m.rule;
  o.cache.block = s.block;
  o.max_rows = s.rows;
  o.max_sequences = s.sequences;
  o.prefix_cache = prefix_cache;
  o.cache.bytes = KvCache::entry_bytes(m.c, m.model) * s.block * 4 * s.groups;
  return o;
}

/// Prompts that begin as others do, or as a text that was written did.
Request random_request(Random& r, const std::vector<Ids>& beginnings, std::vector<Ids>& texts) {
  Request q;
  const Ids& of =
      !texts.empty() && r.from_to(0, 2) == 0
          ? texts[static_cast<std::size_t>(r.from_to(0, static_cast<std::int64_t>(texts.size()) - 1))]
          : beginnings[static_cast<std::size_t>(r.from_to(0, 2))];
  const auto length = static_cast<std::int64_t>(of.size());
  q.prompt.assign(of.begin(), of.begin() + (r.from_to(0, 1) == 0 ? length : r.from_to(1, length)));
  const Ids more = r.ids(r.from_to(0, 1) == 0 ? 0 : r.from_to(1, 30));
  q.prompt.insert(q.prompt.end(), more.begin(), more.end());
  q.max_tokens = r.from_to(0, 24);
  if (q.prompt.size() > static_cast<std::size_t>(kContext)) q.prompt.resize(kContext);
  q.sampling.temperature = r.from_to(0, 1) == 0 ? 0.0 : 1.0;
  q.sampling.seed = static_cast<std::uint64_t>(r.from_to(0, 3));
  q.logprobs = true;
  q.prompt_logprobs = r.from_to(0, 5) == 0;
  q.prefix_cache = r.from_to(0, 7) != 0;
  if (r.from_to(0, 2) == 0) q.threshold = r.from_to(0, 1) == 0 ? 0.42 : 0.6;
  return q;
}

class Prefixes : public ::testing::TestWithParam<Case> {};

std::int64_t schedules(std::int64_t usual) {
  const char* given = std::getenv("FATHOM_SCHEDULES");
  return given == nullptr ? usual : std::atoll(given);
}

struct Totals {
  std::int64_t hits = 0, preemptions = 0, answers = 0;
};

/// One engine with a prefix cache and little room, requests that come and go, and every answer against that
/// of an engine which shares nothing.
void expect_equal_answers(Model& m, std::uint64_t seed, Totals& totals) {
  Random r(seed);
  Sizes s{16 * r.from_to(1, 3), r.from_to(1, 60), r.from_to(1, 6), 0};
  const std::int64_t whole = kContext / s.block + 2;
  s.groups = r.from_to(whole, 2 * whole);
  Engine engine(m.c, m.model, options_of(m, s, true));
  Sizes alone_sizes = s;
  alone_sizes.groups = 8 * whole;
  Engine alone(m.c, m.model, options_of(m, alone_sizes, false));
  const std::vector<Ids> beginnings = {r.ids(100), r.ids(70), r.ids(20)};
  std::vector<Ids> texts;
  std::map<RequestId, std::pair<Request, Answer>> open;
  std::int64_t to_come = r.from_to(8, 30);
  while (to_come > 0 || !engine.idle()) {
    if (to_come > 0 && (engine.idle() || r.from_to(0, 3) == 0)) {
      const Request q = random_request(r, beginnings, texts);
      open[engine.submit(q)].first = q;
      --to_come;
    }
    if (!open.empty() && r.from_to(0, 40) == 0) {
      auto gone = open.begin();
      std::advance(gone, r.from_to(0, static_cast<std::int64_t>(open.size()) - 1));
      engine.cancel(gone->first);
      open.erase(gone);
    }
    for (const Event& e : engine.step()) {
      auto& [request, answer] = open.at(e.request);
      add(answer, e);
      if (e.finish == Finish::None) continue;
      const Answer expected = run_alone(alone, request);
      ASSERT_EQ(answer.ids, expected.ids);
      ASSERT_TRUE(answer == expected)
          << "prompt of " << request.prompt.size() << ", cached " << answer.cached;
      EXPECT_EQ(expected.cached, 0);
      EXPECT_EQ(answer.cached % s.block, 0);
      EXPECT_TRUE(answer.cached == 0 || request.prefix_cache);
      Ids text = request.prompt;
      text.insert(text.end(), answer.ids.begin(), answer.ids.end());
      texts.push_back(text);
      ++totals.answers;
      open.erase(e.request);
    }
  }
  const EngineStats stats = engine.stats();
  EXPECT_EQ(stats.free_blocks, stats.blocks) << "blocks that nobody needs are not free";
  totals.hits += stats.prefix_hit_tokens;
  totals.preemptions += stats.preemptions;
}

TEST_P(Prefixes, ThatAreSharedChangeNoBit) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, GetParam().routing, kContext);
  Totals totals;
  for (std::int64_t seed = 0; seed < schedules(40); ++seed) {
    SCOPED_TRACE(seed);
    expect_equal_answers(m, static_cast<std::uint64_t>(seed), totals);
    if (HasFailure()) return;
  }
  if (schedules(40) < 40) return;
  EXPECT_GT(totals.hits, 4 * totals.answers);
  if (!m.model.routed_layers().empty()) {
    EXPECT_GT(totals.preemptions, 0);
  }
  EXPECT_GT(totals.answers, 0);
}

TEST_P(Prefixes, ThatAreSharedChangeNoBitOfCodes) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, GetParam().routing, kContext);
  Totals totals;
  for (const int bits : {8, 4}) {
    m.model.set_kv_bits(bits);
    for (std::int64_t seed = 100; seed < 100 + schedules(8); ++seed) {
      SCOPED_TRACE(fmt::format("{} bits, {}", bits, seed));
      expect_equal_answers(m, static_cast<std::uint64_t>(seed), totals);
      if (HasFailure()) return;
    }
  }
  EXPECT_GT(totals.hits, 100);
}

INSTANTIATE_TEST_SUITE_P(Kinds, Prefixes, ::testing::ValuesIn(cases()),
                         [](const auto& kind) { return kind.param.name; });

class CudaPrefixes : public ::testing::TestWithParam<Case> {};

TEST_P(CudaPrefixes, ThatAreSharedChangeNoBit) {
  const testing_support::OpenedDevice opened =
      testing_support::open_device(testing_support::Device::Cuda, {.invariant = true});
  testing_support::skip_without(opened);
  if (!opened.backend) return;
  Totals totals;
  for (const DType dtype : {DType::F32, DType::BF16}) {
    SCOPED_TRACE(name_of(dtype));
    Model m(opened.backend, dtype, GetParam().routing, kContext);
    for (const int bits : {16, 4}) {
      SCOPED_TRACE(bits);
      m.model.set_kv_bits(bits);
      for (std::uint64_t seed = 0; seed < 6; ++seed) expect_equal_answers(m, seed, totals);
    }
  }
  EXPECT_GT(totals.hits, 100);
}

INSTANTIATE_TEST_SUITE_P(Kinds, CudaPrefixes, ::testing::ValuesIn(cases()),
                         [](const auto& kind) { return kind.param.name; });

class SharedPrefixes : public ::testing::Test {
 protected:
  Engine engine(std::int64_t groups, bool prefix_cache = true) {
    return Engine(m.c, m.model, options_of(m, {16, 64, 8, groups}, prefix_cache));
  }
  Model m{make_cpu_backend({.invariant = true}, 1), DType::F32, depth(CausalMethod::Predictor), kContext};
  Random r{1};
};

TEST_F(SharedPrefixes, AreComputedOnce) {
  Engine e = engine(200);
  Request q{.prompt = r.ids(100), .max_tokens = 1};
  EXPECT_EQ(run_alone(e, q).cached, 0);
  EXPECT_EQ(e.stats().prompt_tokens, 100);
  EXPECT_EQ(run_alone(e, q).cached, 96);
  EXPECT_EQ(e.stats().prompt_tokens, 104);
  EXPECT_EQ(e.stats().prefix_hit_tokens, 96);
  EXPECT_GT(e.stats().prefix_blocks, 0);
  // Of whole blocks of the prompt at least the last token is computed: something has to follow from it.
  q.prompt.resize(96);
  EXPECT_EQ(run_alone(e, q).cached, 80);
  // Scores of a prompt come from its own rows.
  q.prompt_logprobs = true;
  EXPECT_EQ(run_alone(e, q).cached, 0);
  q.prompt_logprobs = false;
  q.prefix_cache = false;
  EXPECT_EQ(run_alone(e, q).cached, 0);
  // Another threshold has other entries.
  q.prefix_cache = true;
  q.threshold = 0.4;
  EXPECT_EQ(run_alone(e, q).cached, 0);
  EXPECT_EQ(run_alone(e, q).cached, 80);
}

TEST_F(SharedPrefixes, GoOnFromWhatWasWrittenToo) {
  Engine e = engine(200);
  Request q{.prompt = r.ids(10), .max_tokens = 60};
  const Answer first = run_alone(e, q);
  q.prompt.insert(q.prompt.end(), first.ids.begin(), first.ids.end());
  EXPECT_EQ(run_alone(e, q).cached, 64);
}

// Those that wait for their first rows go on from what the ones before them computed meanwhile.
TEST_F(SharedPrefixes, AreFoundByThoseThatCameAtTheSameTime) {
  Engine e = engine(400);
  Request q{.prompt = r.ids(64), .max_tokens = 1};
  std::int64_t cached = 0;
  for (int i = 0; i < 8; ++i) {
    q.prompt.resize(64);
    q.prompt.push_back(i);
    e.submit(q);
  }
  while (!e.idle()) {
    for (const Event& event : e.step()) cached += event.cached_tokens;
  }
  EXPECT_EQ(cached, 7 * 64);
}

// A cache that holds one text: what others left gives way, oldest first.
TEST_F(SharedPrefixes, GiveWayToWhatRuns) {
  Engine e = engine(16);
  std::vector<Request> all;
  for (int i = 0; i < 6; ++i) all.push_back({.prompt = r.ids(80), .max_tokens = 20});
  for (const Request& q : all) EXPECT_EQ(run_alone(e, q).ids.size(), 20U);
  EXPECT_GT(run_alone(e, all.back()).cached, 0);
  EXPECT_EQ(run_alone(e, all.front()).cached, 0);
  EXPECT_EQ(e.stats().free_blocks, e.stats().blocks);
}

// What finishes without a prefix cache finishes with one, however its shared blocks lie.
TEST_F(SharedPrefixes, TakeNoRoomThatATextNeeds) {
  for (std::int64_t groups = 6; groups <= 14; ++groups) {
    for (std::uint64_t seed = 0; seed < 10; ++seed) {
      SCOPED_TRACE(fmt::format("{} groups, seed {}", groups, seed));
      Random random(seed);
      const Ids beginning = random.ids(48);
      Engine with(m.c, m.model, options_of(m, {16, 24, 4, groups}, true));
      for (int i = 0; i < 4; ++i) {
        Request q{.prompt = beginning, .max_tokens = random.from_to(1, 90)};
        const Ids more = random.ids(random.from_to(0, 20));
        q.prompt.insert(q.prompt.end(), more.begin(), more.end());
        q.sampling.seed = seed + static_cast<std::uint64_t>(i);
        Engine without(m.c, m.model, options_of(m, {16, 24, 4, groups}, false));
        const auto end_of = [&](Engine& e) {
          Finish finish = Finish::None;
          try {
            e.submit(q);
          } catch (const UserError&) {
            return Finish::None;
          }
          while (!e.idle()) {
            for (const Event& event : e.step()) finish = event.finish == Finish::None ? finish : event.finish;
          }
          return finish;
        };
        ASSERT_EQ(end_of(without), end_of(with));
        ASSERT_EQ(with.stats().free_blocks, with.stats().blocks);
      }
    }
  }
}

}  // namespace
}  // namespace fathom
