// Speculative decoding inside the engine: texts that go over from passes to cycles and back, whoever comes,
// goes or has no room, are those of an engine without it; and nothing of them stays.
#include "infer/speculate/speculative_cycles.h"

#include <cmath>
#include <functional>
#include <map>
#include <optional>

#include <fmt/format.h>
#include <gmock/gmock.h>

#include "infer/engine.h"
#include "infer/generate.h"
#include "kernels/error.h"
#include "tests/devices.h"
#include "tests/forwarding_backend.h"
#include "tests/infer/all_outcomes.h"
#include "tests/infer/tiny_models.h"
#include "tests/infer/ways_to_speculate.h"

namespace fathom {
namespace {

using namespace tiny_models;
using Ids = std::vector<std::int32_t>;
using Method = SpeculationOptions::Method;
using Draft = SpeculationOptions::Draft;
using ::testing::HasSubstr;

constexpr std::int64_t kContext = 400;

using testing_support::Way;

SpeculationOptions options_of(Method method, Draft draft, std::int64_t proposals, std::int64_t between = 1) {
  SpeculationOptions o = testing_support::way_of(method, draft, proposals, between);
  o.plain_first = 0;
  return o;
}

std::vector<Way> ways(const Transformer& model) {
  std::vector<Way> all = {{"ngram", options_of(Method::Ngram, Draft::Ngram, 4)},
                          {"retrieval", options_of(Method::Retrieval, Draft::Ngram, 6)},
                          {"draft", options_of(Method::Draft, Draft::Model, 3)},
                          {"triforce_model", options_of(Method::Triforce, Draft::Model, 6, 2)},
                          {"triforce_auto", options_of(Method::Triforce, Draft::Model, 0)}};
  if (testing_support::skips(model))
    all.push_back({"self_skip", options_of(Method::Draft, Draft::SelfSkip, 4)});
  return all;
}

/// What an engine said of a text.
struct Seen {
  Request request;
  Ids ids = {};
  std::vector<double> logprobs = {}, prompt_logprobs = {}, routed_fraction = {};
  std::vector<std::vector<SampledToken>> alternatives = {};
  std::vector<std::vector<std::uint8_t>> kept = {};
  Finish finish = Finish::None;
  std::string error = {};
  std::int64_t events = 0, cached_tokens = 0, verifications = 0, verified_tokens = 0;

  void take(const Event& e) {
    ++events;
    if (e.has_token) ids.push_back(e.token.id);
    if (e.has_token || e.has_stop_token) {
      logprobs.push_back(e.token.logprob);
      if (request.top_logprobs > 0) alternatives.push_back(e.alternatives);
    }
    prompt_logprobs.insert(prompt_logprobs.end(), e.prompt_logprobs.begin(), e.prompt_logprobs.end());
    kept.insert(kept.end(), e.kept.begin(), e.kept.end());
    finish = e.finish;
    error = e.error;
    if (finish == Finish::None) return;
    routed_fraction = e.routed_fraction;
    cached_tokens = e.cached_tokens;
    verifications = e.verifications;
    verified_tokens = e.verified_tokens;
  }
};

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

void expect_same(const Seen& a, const Seen& b) {
  ASSERT_EQ(a.ids, b.ids);
  EXPECT_EQ(a.finish, b.finish) << a.error << b.error;
  ASSERT_EQ(a.logprobs.size(), b.logprobs.size());
  for (std::size_t i = 0; i < a.logprobs.size(); ++i) EXPECT_TRUE(same(a.logprobs[i], b.logprobs[i])) << i;
  EXPECT_EQ(a.prompt_logprobs, b.prompt_logprobs);
  EXPECT_EQ(a.kept, b.kept);
  EXPECT_EQ(a.routed_fraction, b.routed_fraction);
  ASSERT_EQ(a.alternatives.size(), b.alternatives.size());
  for (std::size_t i = 0; i < a.alternatives.size(); ++i) {
    ASSERT_EQ(a.alternatives[i].size(), b.alternatives[i].size());
    for (std::size_t k = 0; k < a.alternatives[i].size(); ++k) {
      EXPECT_EQ(a.alternatives[i][k].id, b.alternatives[i][k].id);
      EXPECT_EQ(a.alternatives[i][k].logprob, b.alternatives[i][k].logprob);
    }
  }
}

struct Setting {
  std::int64_t most_texts = 1;
  std::int64_t cache_tokens = 8 * kContext;
  bool prefix_cache = true, shared_noise = false;
  std::int64_t vocab = kVocab, sequences = 8;
};

/// An engine, a draft, and what speculates; without `o`: nothing.
struct Server {
  Model draft;
  KvCache draft_cache;
  CachedModel small;
  Engine engine;
  std::optional<SpeculativeCycles> cycles;

  static KvCacheOptions cache_of(Context& c, const Transformer& model, std::int64_t tokens) {
    return {.block = 16, .bytes = KvCache::entry_bytes(c, model) * tokens * 5};
  }
  static EngineOptions engine_options(Model& m, const Setting& s) {
    EngineOptions o;
    o.rule = m.rule;
    o.cache = cache_of(m.c, m.model, s.cache_tokens);
    o.vocab = s.vocab;
    o.max_rows = 40;
    o.max_sequences = s.sequences;
    o.prefix_cache = s.prefix_cache;
    o.shared_noise = s.shared_noise;
    return o;
  }

  Server(Model& m, const SpeculationOptions* o, const Setting& s = {})
      : draft(m.c.shared_backend(), m.c.compute_dtype(), depth(CausalMethod::Aux), kContext, 6),
        draft_cache(draft.c, draft.model, cache_of(draft.c, draft.model, 2 * kContext)),
        small{draft.c, draft.model, draft.rule, draft_cache, kVocab, 50},
        engine(m.c, m.model, engine_options(m, s)) {
    if (o == nullptr) return;
    cycles.emplace(engine.cached_model(), &small, *o, s.most_texts);
    engine.go_by(&*cycles);
  }

  bool is_free() const {
    const EngineStats s = engine.stats();
    return s.free_blocks == s.blocks && draft_cache.pool().free_groups() == draft_cache.pool().groups();
  }
};

Seen alone(Server& server, const Request& request) {
  Seen seen{.request = request};
  server.engine.submit(request);
  while (!server.engine.idle()) {
    for (const Event& e : server.engine.step()) seen.take(e);
  }
  return seen;
}

Ids random_ids(std::int64_t n, std::uint64_t seed) {
  std::mt19937_64 r(seed);
  Ids ids(static_cast<std::size_t>(n));
  for (std::int32_t& id : ids) id = static_cast<std::int32_t>(r() % kVocab);
  return ids;
}

Request random_request(std::mt19937_64& r) {
  const auto from_to = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(r);
  };
  Request q;
  q.prompt = random_ids(from_to(0, 3) == 0 ? from_to(100, kContext) : from_to(1, 60), r());
  q.max_tokens = from_to(0, 9) == 0 ? 0 : from_to(1, 60);
  q.sampling.temperature = 0;
  q.logprobs = from_to(0, 2) == 0;
  q.top_logprobs = q.logprobs ? from_to(0, 3) : 0;
  q.prompt_logprobs = from_to(0, 4) == 0;
  q.routing = from_to(0, 1) == 0;
  if (from_to(0, 2) == 0) q.stop_tokens = {3, 17};
  if (from_to(0, 2) == 0) q.sampling.repetition_penalty = 1.4;
  if (from_to(0, 2) == 0) q.sampling.logit_bias = {{4, 1.0}};
  if (from_to(0, 1) == 0) q.threshold = 0.4 + 0.05 * static_cast<double>(from_to(0, 4));
  return q;
}

/// Requests that come one into the other, some of which are cancelled; those that ended.
std::vector<Seen> crowd(Server& server, std::mt19937_64& r, std::int64_t count,
                        const std::function<Request(std::mt19937_64&)>& next) {
  std::map<RequestId, Seen> open;
  std::vector<Seen> ended;
  while (count > 0 || !server.engine.idle()) {
    // Now and then a text is alone for a while.
    if (count > 0 && (server.engine.idle() || r() % 12 == 0)) {
      Request q = next(r);
      if (server.engine.context() < std::ssize(q.prompt)) continue;
      open[server.engine.submit(q)].request = q;
      --count;
    }
    if (!open.empty() && r() % 60 == 0) {
      server.engine.cancel(open.begin()->first);
      open.erase(open.begin());
    }
    for (const Event& e : server.engine.step()) {
      open.at(e.request).take(e);
      if (e.finish == Finish::None) continue;
      ended.push_back(open.at(e.request));
      open.erase(e.request);
    }
  }
  return ended;
}

std::int64_t times(std::int64_t usual) {
  const char* given = std::getenv("FATHOM_SCHEDULES");
  return given == nullptr ? usual : std::atoll(given);
}

/// Greedy texts, alone and in crowds.
void expect_plain_texts(Model& m, std::int64_t schedules, std::int64_t requests) {
  for (const Way& way : ways(m.model)) {
    std::int64_t verified = 0, verifications = 0, plain = 0;
    for (std::int64_t seed = 0; seed < schedules; ++seed) {
      SCOPED_TRACE(fmt::format("{}, schedule {}", way.name, seed));
      std::mt19937_64 r(static_cast<std::uint64_t>(seed) + 1);
      const Setting setting{.most_texts = 1 + seed % 3, .prefix_cache = seed % 2 == 0};
      Server with(m, &way.options, setting), without(m, nullptr, {.prefix_cache = false});
      for (const Seen& seen : crowd(with, r, requests, random_request)) {
        expect_same(seen, alone(without, seen.request));
        if (::testing::Test::HasFailure()) return;
        verified += seen.verified_tokens;
        verifications += seen.verifications;
        plain += std::ssize(seen.ids) - seen.verified_tokens;
      }
      EXPECT_TRUE(with.is_free());
      const EngineStats stats = with.engine.stats();
      EXPECT_GT(stats.cycles.levels.back().passes, 0);
      EXPECT_EQ(stats.cycles.plain_texts.size(), 0U);
    }
    EXPECT_GT(verified, 0) << way.name;
    EXPECT_GE(verified, verifications) << way.name;
    EXPECT_GT(plain, 0) << way.name;
  }
}

class SpeculativeCyclesKinds : public ::testing::TestWithParam<Case> {};

TEST_P(SpeculativeCyclesKinds, GreedyTextsAreThoseWithoutThem) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, GetParam().routing, kContext);
  expect_plain_texts(m, times(2), 8);
}

TEST_P(SpeculativeCyclesKinds, TextsUnderSharedNoiseAreThoseWithoutThem) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, GetParam().routing, kContext);
  const auto next = [](std::mt19937_64& r) {
    Request q = random_request(r);
    q.sampling.temperature = 0.9;
    q.sampling.top_p = 0.95;
    q.sampling.seed = r();
    q.repeatable = true;
    return q;
  };
  for (Way way : ways(m.model)) {
    SCOPED_TRACE(way.name);
    way.options.tokens = RowRule::Tokens::SharedNoise;
    std::mt19937_64 r(3);
    Server with(m, &way.options, {.shared_noise = true}), without(m, nullptr, {.shared_noise = true});
    for (const Seen& seen : crowd(with, r, 6, next)) expect_same(seen, alone(without, seen.request));
    if (HasFailure()) return;
    EXPECT_GT(with.engine.stats().cycles.levels.back().tokens, 0);
    EXPECT_TRUE(with.is_free());
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, SpeculativeCyclesKinds, ::testing::ValuesIn(cases()),
                         [](const auto& kind) { return kind.param.name; });

class CudaSpeculativeCyclesKinds : public ::testing::TestWithParam<Case> {};

TEST_P(CudaSpeculativeCyclesKinds, GreedyTextsAreThoseWithoutThem) {
  const testing_support::OpenedDevice opened =
      testing_support::open_device(testing_support::Device::Cuda, {.invariant = true});
  testing_support::skip_without(opened);
  if (!opened.backend) return;
  for (const DType dtype : {DType::F32, DType::BF16}) {
    SCOPED_TRACE(name_of(dtype));
    Model m(opened.backend, dtype, GetParam().routing, kContext);
    expect_plain_texts(m, 2, 6);
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, CudaSpeculativeCyclesKinds, ::testing::ValuesIn(cases()),
                         [](const auto& kind) { return kind.param.name; });

/// What plain sampling writes after a prompt, from the whole pass's logits.
outcomes::Texts sampled_texts(Model& m, std::int64_t vocab, const Request& request) {
  outcomes::Texts open{{Ids{}, 1.0}};
  for (std::int64_t n = 0; n < request.max_tokens; ++n) {
    outcomes::Texts longer;
    for (const auto& [text, weight] : open) {
      Ids whole = request.prompt;
      whole.insert(whole.end(), text.begin(), text.end());
      const std::vector<float> logits = causal_logits(m.c, m.model, whole, m.rule);
      const std::span<const float> last(logits.data() + (whole.size() - 1) * kVocab,
                                        static_cast<std::size_t>(vocab));
      std::vector<double> p;
      probabilities(last, request.sampling, whole.size(), {request.prompt, text}, p);
      for (std::size_t v = 0; v < p.size(); ++v) {
        Ids next = text;
        next.push_back(static_cast<std::int32_t>(v));
        if (p[v] > 0) longer[next] += weight * p[v];
      }
    }
    open = std::move(longer);
  }
  return open;
}

std::int64_t draws(std::int64_t usual) {
  const char* given = std::getenv("FATHOM_SPECULATION_DRAWS");
  return given == nullptr ? usual : std::atoll(given);
}

// Drawn texts at T = 1, some of whose tokens come of cycles and some of passes beside another text: a
// chi-squared against their probabilities.
TEST(SpeculativeCycles, DrawnTextsThatChangeOverAreDistributedAsPlainOnes) {
  constexpr std::int64_t kFew = 3;
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, depth(CausalMethod::Predictor), kContext);
  Request request{.max_tokens = 6};
  for (std::int32_t i = 0; i < 40; ++i) request.prompt.push_back(i * i % 5 % 3);
  request.sampling = {.temperature = 1};
  const outcomes::Texts expected = sampled_texts(m, kFew, request);
  const std::int64_t n = draws(2500);
  for (Way way : ways(m.model)) {
    if (way.options.proposals == 0) continue;  // these texts end before it proposes
    way.options.retrieval = {.budget = 16, .chunk = 2};
    Server server(m, &way.options, {.vocab = kFew});
    std::map<Ids, std::int64_t> counts;
    std::int64_t verified = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      request.sampling.seed = static_cast<std::uint64_t>(i) * 7919 + 1;
      const RequestId id = server.engine.submit(request);
      Seen seen{.request = request};
      for (std::int64_t step = 0; seen.finish == Finish::None; ++step) {
        // Somebody else is there for a step, at the third or the fourth, or for none.
        RequestId other = -1;
        if (i % 3 > 0 && step == 1 + i % 3) other = server.engine.submit({.prompt = {1, 2}, .max_tokens = 9});
        for (const Event& e : server.engine.step()) {
          if (e.request == id) seen.take(e);
        }
        if (other >= 0) server.engine.cancel(other);
      }
      ++counts[seen.ids];
      verified += seen.verified_tokens;
    }
    double chi = 0, degrees = -1, rare_found = 0, rare = 0;
    const auto add = [&](double found, double wanted) {
      chi += (found - wanted) * (found - wanted) / wanted;
      ++degrees;
    };
    for (const auto& [text, p] : expected) {
      const double wanted = p * static_cast<double>(n), found = static_cast<double>(counts[text]);
      if (wanted < 8) {
        rare += wanted, rare_found += found;
      } else {
        add(found, wanted);
      }
    }
    if (rare > 0) add(rare_found, rare);
    const CycleStats::Level level = server.engine.stats().cycles.levels.back();
    RecordProperty(way.name, fmt::format("chi-squared {:.1f}, {} degrees, {} of {} proposals taken", chi,
                                         degrees, level.accepted, level.proposed));
    EXPECT_GT(degrees, 10);
    EXPECT_LT(chi, degrees + 4.5 * std::sqrt(2 * degrees)) << way.name << ", " << degrees << " degrees";
    EXPECT_GT(level.accepted, 0) << way.name;
    EXPECT_LT(level.accepted, level.proposed) << way.name;
    EXPECT_GT(verified, n) << way.name;
    EXPECT_LT(verified, n * 5) << way.name;
  }
}

// A text whose seed somebody named is the one that the engine writes without any of this.
TEST(SpeculativeCycles, ATextThatIsToBeRepeatableIsThePlainOne) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, depth(CausalMethod::Aux), kContext);
  const SpeculationOptions o = options_of(Method::Retrieval, Draft::Ngram, 5);
  Server with(m, &o), without(m, nullptr);
  Request q{.prompt = random_ids(80, 4), .max_tokens = 40, .sampling = {.temperature = 1, .seed = 9}};
  q.repeatable = true;
  const Seen repeatable = alone(with, q);
  expect_same(repeatable, alone(without, q));
  EXPECT_EQ(repeatable.verifications, 0);
  EXPECT_EQ(with.engine.stats().cycles.plain_texts.at("seed"), 1);
  q.sampling.temperature = 0;  // nothing is drawn
  EXPECT_GT(alone(with, q).verifications, 0);
  q.sampling.temperature = 1;
  q.repeatable = false;
  EXPECT_GT(alone(with, q).verifications, 0);
  EXPECT_EQ(with.engine.stats().cycles.plain_texts.at("seed"), 1);
}

// Where there is no room, what speculates has none; no text fails that does not without it, and each is what
// it is.
TEST(SpeculativeCycles, NoTextFailsForWantOfTheRoomThatTheyTake) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, depth(CausalMethod::Aux), kContext);
  std::int64_t given_up = 0, preempted = 0, ended = 0, failed = 0;
  for (const Way& way : ways(m.model)) {
    for (std::int64_t tokens = 60; tokens < 420; tokens += 45) {
      SCOPED_TRACE(fmt::format("{} with room for {}", way.name, tokens));
      const Setting setting{.most_texts = 1 + tokens % 2, .cache_tokens = tokens};
      Server with(m, &way.options, setting), without(m, nullptr, {.cache_tokens = tokens});
      std::mt19937_64 r(static_cast<std::uint64_t>(tokens));
      const auto next = [&](std::mt19937_64& g) {
        Request q{.prompt = random_ids(30 + static_cast<std::int64_t>(g() % 40), g()),
                  .max_tokens = 20 + static_cast<std::int64_t>(g() % 100)};
        q.sampling.temperature = 0;
        return q;
      };
      for (const Seen& seen : crowd(with, r, 6, next)) {
        const Seen expected = alone(without, seen.request);
        expect_same(seen, expected);
        if (HasFailure()) return;
        ++(seen.finish == Finish::Error ? failed : ended);
      }
      EXPECT_TRUE(with.is_free());
      given_up += with.engine.stats().cycles.given_up;
      preempted += with.engine.stats().preemptions;
    }
  }
  EXPECT_GT(given_up, 0);
  EXPECT_GT(preempted, 0);
  EXPECT_GT(ended, 20);
  EXPECT_GT(failed, 0);
}

// What texts left for later ones gives way to what speculates for one that runs.
TEST(SpeculativeCycles, BeginningsThatNobodyReadsMakeRoom) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, depth(CausalMethod::Aux), kContext);
  const SpeculationOptions o = options_of(Method::Retrieval, Draft::Ngram, 5);
  Server server(m, &o, {.cache_tokens = 2 * kContext});
  for (std::uint64_t i = 0; i < 12; ++i) {
    const auto before = server.engine.stats().cycles.levels.front().passes;
    Request q{.prompt = random_ids(200, i), .max_tokens = 30};
    q.sampling.temperature = 0;
    alone(server, q);
    EXPECT_GT(server.engine.stats().cycles.levels.front().passes, before + 10) << i;
  }
  EXPECT_GT(server.engine.stats().prefix_blocks, 0);
  EXPECT_TRUE(server.is_free());
}

// Whoever ends a text at a token of a cycle knows from that token's event what its end would have said.
TEST(SpeculativeCycles, ATextMayEndAtAnyTokenOfACycle) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, depth(CausalMethod::Aux), kContext);
  const SpeculationOptions o = options_of(Method::Retrieval, Draft::Ngram, 6);
  Server without(m, nullptr, {.prefix_cache = false});
  int in_mid_cycle = 0;
  for (std::int64_t length = 1; length < 40; ++length) {
    Request q{.prompt = random_ids(60, 7), .max_tokens = length, .sampling = {.temperature = 0}};
    q.routing = true;
    Seen expected = alone(without, q);
    q.max_tokens = 80;
    Server with(m, &o);
    const RequestId id = with.engine.submit(q);
    Seen seen{.request = q};
    while (std::ssize(seen.ids) < length) {
      bool cut = false;
      for (const Event& e : with.engine.step()) {
        cut = std::ssize(seen.ids) == length;
        if (cut) break;
        seen.take(e);
        seen.routed_fraction = e.routed_fraction;
        seen.finish = expected.finish;
      }
      in_mid_cycle += cut ? 1 : 0;
    }
    with.engine.cancel(id);
    EXPECT_TRUE(with.is_free());
    if (seen.routed_fraction.empty()) continue;  // of a pass: Engine::stop() says it
    expect_same(seen, expected);
  }
  EXPECT_GT(in_mid_cycle, 10);
}

// The last row of a prompt whose beginning is shared is computed by a cycle.
TEST(SpeculativeCycles, PromptsBehindWhatIsSharedAreCounted) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, depth(CausalMethod::Aux), kContext);
  const SpeculationOptions o = options_of(Method::Ngram, Draft::Ngram, 3);
  Server with(m, &o), without(m, nullptr);
  const Request q{.prompt = random_ids(65, 3), .max_tokens = 5, .sampling = {.temperature = 0}};
  for (std::int64_t turn = 1; turn <= 3; ++turn) {
    for (Server* server : {&with, &without}) {
      alone(*server, q);
      const EngineStats s = server->engine.stats();
      EXPECT_EQ(s.prompt_tokens + s.prefix_hit_tokens, 65 * turn);
    }
  }
}

/// Has no memory left for one of its attentions.
class FailingBackend final : public testing_support::ForwardingBackend {
 public:
  using ForwardingBackend::ForwardingBackend;
  void cached_attention(View out, ConstView pool, ConstView qkv, ConstView tables, ConstView sequences,
                        ConstView lengths, const CacheShape& s) override {
    if (--left == 0) throw MemoryError("There is no memory.", "Give it some.");
    ForwardingBackend::cached_attention(out, pool, qkv, tables, sequences, lengths, s);
  }
  std::int64_t left = 0;
};

TEST(SpeculativeCycles, ATextWhoseCycleFailsGoesOnPlainly) {
  const auto backend = std::make_shared<FailingBackend>(make_cpu_backend({.invariant = true}, 1));
  Model m(backend, DType::F32, depth(CausalMethod::Aux), kContext);
  Request q{.prompt = random_ids(30, 2), .max_tokens = 40, .sampling = {.temperature = 0}};
  q.routing = true;
  Server without(m, nullptr);
  const Seen expected = alone(without, q);
  for (const Way& way : ways(m.model)) {
    std::int64_t failed = 0;
    for (std::int64_t at = 9; at < 300; at += 13) {  // behind the prompt's pass
      SCOPED_TRACE(fmt::format("{} at {}", way.name, at));
      Server with(m, &way.options);
      backend->left = at;
      const Seen seen = alone(with, q);
      backend->left = 0;
      if (seen.finish == Finish::Error) {  // that was a pass of the engine
        EXPECT_THAT(seen.error, HasSubstr("no memory"));
      } else {
        expect_same(seen, expected);
        const auto& plain = with.engine.stats().cycles.plain_texts;
        failed += plain.contains("failed") ? plain.at("failed") : 0;
      }
      EXPECT_TRUE(with.is_free());
    }
    EXPECT_GT(failed, 3) << way.name;
  }
}

void expect_refused(Model& m, const SpeculationOptions& o, const Setting& setting, const std::string& why) {
  try {
    const Server server(m, &o, setting);
    ADD_FAILURE() << "no error: " << why;
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), HasSubstr(why));
  }
}

TEST(SpeculativeCycles, SayBeforeAnyTextWhatCannotBe) {
  Model m(make_cpu_backend({}, 1), DType::F32, depth(CausalMethod::Aux), kContext);
  SpeculationOptions o = options_of(Method::Retrieval, Draft::Ngram, 4);
  o.retrieval.budget = kContext;
  expect_refused(m, o, {}, "leaves nothing out of this model's context of 400");
  o.retrieval = {.budget = 48, .chunk = 4};
  expect_refused(m, o, {.cache_tokens = 16}, "has no room for 48 entries that are retrieved");
  o = options_of(Method::Ngram, Draft::Ngram, 17);
  expect_refused(m, o, {}, "number of proposals");
  Model longer(make_cpu_backend({}, 1), DType::F32, {}, kContext + 1);
  expect_refused(longer, options_of(Method::Draft, Draft::Model, 4), {},
                 "The draft's context is 400 tokens, and this text may come to 401.");
  expect_refused(longer, options_of(Method::Draft, Draft::SelfSkip, 4), {}, "no routed blocks");
}

}  // namespace
}  // namespace fathom
