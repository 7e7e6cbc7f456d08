// Speculative decoding whose single rows are whole steps of the GPU, between passes over proposals and rows
// that are taken back: every token is the most likely one behind the text before it, or as good as that.
#include "infer/speculate/speculation.h"
#include "infer/speculate/speculative_cycles.h"
#include "tests/infer/cuda/whole_step_models.h"

namespace fathom {
namespace {

using namespace whole_step_test;
using Method = SpeculationOptions::Method;

constexpr std::int64_t kContext = 320;

/// Tokens of a text from `first` on, each against the CPU's logits of the text before it.
void expect_likeliest(Pair& p, const Ids& ids, std::size_t first, const std::string& what) {
  const std::vector<float> logits = causal_logits(p.cpu, p.on_cpu, ids, p.rule);
  for (std::size_t i = first; i < ids.size(); ++i) {
    const std::span<const float> row(logits.data() + (i - 1) * kVocab, kVocab);
    const auto [least, most] = std::minmax_element(row.begin(), row.end());
    const float chosen = row[static_cast<std::size_t>(ids[i])];
    ASSERT_LT(*most - chosen, 0.03F * std::max(*most, -*least)) << what << ", token " << i;
  }
}

class CudaSpeculationSteps : public testing_support::OnCuda<::testing::TestWithParam<Case>> {};

TEST_P(CudaSpeculationSteps, ChooseWhatTheWholePassFindsLikeliest) {
  Pair p(shared_cuda(), GetParam(), kContext);
  const Transformer& model = p.model();
  const std::int64_t layers = model.config().depth;
  KvCache cache(p.gpu, model,
                {.block = 16, .bytes = KvCache::entry_bytes(p.gpu, model) * layers * 4 * kContext});
  const auto whole = WholeStep::open(p.gpu, model, p.rule, cache, kVocab, 3);
  if (whole == nullptr) GTEST_SKIP() << "This GPU has no whole steps.";
  const auto passes = ShortPasses::open(p.gpu, model, p.rule, cache);
  EXPECT_EQ(passes == nullptr, !model.routed_layers().empty());
  const CachedModel target{p.gpu, model, p.rule, cache, kVocab, 64, whole.get(), nullptr, passes.get()};
  Request request{.max_tokens = 90};
  request.sampling.temperature = 0;
  std::mt19937_64 r(3);
  for (int i = 0; i < 120; ++i) request.prompt.push_back(static_cast<std::int32_t>(r() % 40));

  for (const auto& [method, proposals] :
       std::vector<std::pair<Method, std::int64_t>>{{Method::Plain, 1},
                                                    {Method::Ngram, 3},
                                                    {Method::Ngram, 0},
                                                    {Method::Retrieval, 2},
                                                    {Method::Retrieval, 0},
                                                    {Method::Draft, 3},
                                                    {Method::Triforce, 2}}) {
    SpeculationOptions o;
    o.method = method;
    o.draft = model.routed_layers().empty() ? SpeculationOptions::Draft::Ngram
                                            : SpeculationOptions::Draft::SelfSkip;
    o.window = {.sinks = 4, .recent = 24};
    o.proposals = proposals;
    o.retrieval = {.budget = 64, .chunk = 4};
    Ids ids = request.prompt;
    {
      Speculation s(target, nullptr, o, request);
      for (Finish f = Finish::None; f == Finish::None;) {
        const Speculation::Step step = s.step();
        ids.insert(ids.end(), step.tokens.begin(), step.tokens.end());
        f = step.finish;
      }
    }
    EXPECT_EQ(cache.pool().free_groups(), cache.pool().groups());
    ASSERT_EQ(ids.size(), request.prompt.size() + 90);
    expect_likeliest(p, ids, request.prompt.size(),
                     fmt::format("method {}, {} proposals", static_cast<int>(method), proposals));
  }
}

constexpr std::int64_t kChosen = kVocab - 40;  // ids that are chosen

/// A model's cache, and how its passes are launched.
struct Steps {
  explicit Steps(Pair& of)
      : p(of),
        cache(p.gpu, p.model(),
              {.block = 16,
               .bytes = KvCache::entry_bytes(p.gpu, p.model()) * p.model().config().depth * 4 * kContext}),
        whole(WholeStep::open(p.gpu, p.model(), p.rule, cache, kChosen, 2)),
        passes(ShortPasses::open(p.gpu, p.model(), p.rule, cache)) {}
  CachedModel model() {
    return {p.gpu, p.model(), p.rule, cache, kChosen, 64, whole.get(), nullptr, passes.get()};
  }

  Pair& p;
  KvCache cache;
  std::unique_ptr<WholeStep> whole;
  std::unique_ptr<ShortPasses> passes;
};

// What the device says of a row without its logits is what the logits say, of single rows and of several.
TEST_P(CudaSpeculationSteps, KnowTheLikeliestWithoutLogits) {
  Pair p(shared_cuda(), GetParam(), kContext);
  Steps steps(p);
  if (steps.whole == nullptr) GTEST_SKIP() << "This GPU has no whole steps.";
  KvCache& cache = steps.cache;
  const CachedModel m = steps.model();
  const SequenceId told = cache.add(), read = cache.add();
  std::mt19937_64 r(4);
  std::int64_t at = 0;
  for (const std::int64_t n : {40, 1, 1, 3, 1, 7, 7, 7, 1, 1}) {
    Ids ids;
    for (std::int64_t i = 0; i < n; ++i) ids.push_back(static_cast<std::int32_t>(r() % kVocab));
    const std::int64_t wanted = std::min<std::int64_t>(n, 7);
    const bool shares = n != 3;
    const PassRows choices =
        m.add(told, ids, at, wanted, shares ? Wanted::LikeliestAndShare : Wanted::Likeliest);
    const std::vector<float> logits = m.add(read, ids, at, wanted).logits;
    at += n;
    EXPECT_TRUE(choices.logits.empty());
    ASSERT_EQ(std::ssize(choices.choices), wanted);
    ASSERT_EQ(std::ssize(logits), wanted * kChosen);
    for (std::int64_t i = 0; i < wanted; ++i) {
      const auto row = std::span(logits).subspan(static_cast<std::size_t>(i * kChosen), kChosen);
      const auto most = std::max_element(row.begin(), row.end());
      EXPECT_EQ(choices.choices[static_cast<std::size_t>(i)].id, most - row.begin()) << n << " rows, " << i;
      if (!shares) continue;
      double sum = 0;
      for (const float z : row) sum += std::exp(static_cast<double>(z) - *most);
      EXPECT_NEAR(choices.choices[static_cast<std::size_t>(i)].share, 1 / sum, 1e-5 / sum);
    }
  }
}

// Rows that stay on the device are what the host makes of their logits, of single rows and of several.
TEST_P(CudaSpeculationSteps, KeepTheSharesOfTheirLogits) {
  Pair p(shared_cuda(), GetParam(), kContext);
  Steps steps(p);
  if (steps.whole == nullptr) GTEST_SKIP() << "This GPU has no whole steps.";
  KvCache& cache = steps.cache;
  const CachedModel m = steps.model();
  const SequenceId kept = cache.add(), read = cache.add();
  std::mt19937_64 r(5);
  std::int64_t at = 0;
  std::vector<std::pair<std::shared_ptr<const HeldRows>, std::vector<double>>> earlier;
  for (const std::int64_t n : {40, 1, 1, 3, 1, 7, 7, 7, 1, 1}) {
    Ids ids;
    for (std::int64_t i = 0; i < n; ++i) ids.push_back(static_cast<std::int32_t>(r() % kVocab));
    const std::int64_t wanted = std::min<std::int64_t>(n, 7);
    const PassRows shares = m.add(kept, ids, at, wanted, {Wanted::Shares, 0.7});
    const std::vector<float> logits = m.add(read, ids, at, wanted).logits;
    at += n;
    ASSERT_NE(shares.shares, nullptr);
    EXPECT_TRUE(shares.logits.empty());
    ASSERT_EQ(std::ssize(logits), wanted * kChosen);
    for (std::int64_t i = 0; i < wanted; ++i) {
      const auto row = std::span(logits).subspan(static_cast<std::size_t>(i * kChosen), kChosen);
      std::vector<double> expected;
      probabilities(row, {.temperature = 0.7}, 0, {}, expected);
      const std::vector<double> got = shares.shares->on_host(static_cast<std::size_t>(i));
      ASSERT_EQ(got.size(), expected.size());
      for (std::size_t id = 0; id < got.size(); ++id)
        ASSERT_NEAR(got[id], expected[id], 1e-4 * expected[id] + 1e-9) << n << " rows, " << i << ", " << id;
    }
    // Later passes leave them as they are.
    for (const auto& [rows, first] : earlier) ASSERT_EQ(rows->on_host(0), first);
    earlier.emplace_back(shares.shares, shares.shares->on_host(0));
  }
}

// Drawn texts of single rows that are steps of one launch, passes over proposals and rows that stay where
// they are: the same seed gives the same text, and every token is one that can come.
TEST_P(CudaSpeculationSteps, DrawTheSameTextAgain) {
  Pair p(shared_cuda(), GetParam(), kContext);
  const Transformer& model = p.model();
  KvCache cache(
      p.gpu, model,
      {.block = 16, .bytes = KvCache::entry_bytes(p.gpu, model) * model.config().depth * 4 * kContext});
  const auto whole = WholeStep::open(p.gpu, model, p.rule, cache, kVocab - 40, 3);
  if (whole == nullptr) GTEST_SKIP() << "This GPU has no whole steps.";
  const auto passes = ShortPasses::open(p.gpu, model, p.rule, cache);
  const CachedModel target{p.gpu, model, p.rule, cache, kVocab - 40, 64, whole.get(), nullptr, passes.get()};
  Request request{.max_tokens = 90};
  std::mt19937_64 r(3);
  for (int i = 0; i < 120; ++i) request.prompt.push_back(static_cast<std::int32_t>(r() % 40));
  request.sampling = {.temperature = 0.9, .seed = 11};
  for (const Method method : {Method::Plain, Method::Ngram, Method::Retrieval, Method::Triforce}) {
    SpeculationOptions o;
    o.method = method;
    o.draft = model.routed_layers().empty() ? SpeculationOptions::Draft::Ngram
                                            : SpeculationOptions::Draft::SelfSkip;
    o.window = {.sinks = 4, .recent = 24};
    o.proposals = 3;
    o.retrieval = {.budget = 64, .chunk = 4};
    const auto text = [&] {
      Ids ids;
      Speculation s(target, nullptr, o, request);
      for (Finish f = Finish::None; f == Finish::None;) {
        const Speculation::Step step = s.step();
        ids.insert(ids.end(), step.tokens.begin(), step.tokens.end());
        f = step.finish;
      }
      return ids;
    };
    text();  // passes are recorded when they come for the second time
    const Ids first = text();
    EXPECT_EQ(text(), first) << static_cast<int>(method);
    ASSERT_EQ(first.size(), 90U);
    for (const std::int32_t id : first) ASSERT_LT(id, kVocab - 40);
    EXPECT_EQ(cache.pool().free_groups(), cache.pool().groups());
  }
}

// Cycles over the engine's own sequence, before and behind steps that it has beside another text.
TEST_P(CudaSpeculationSteps, OfTheEnginesTextsDoSoToo) {
  Pair p(shared_cuda(), GetParam(), kContext);
  const Transformer& model = p.model();
  Request request{.max_tokens = 90};
  request.sampling.temperature = 0;
  std::mt19937_64 r(3);
  for (int i = 0; i < 120; ++i) request.prompt.push_back(static_cast<std::int32_t>(r() % 40));
  for (const auto& [method, proposals] : std::vector<std::pair<Method, std::int64_t>>{
           {Method::Ngram, 3}, {Method::Ngram, 0}, {Method::Retrieval, 2}, {Method::Retrieval, 0}}) {
    SCOPED_TRACE(fmt::format("method {}, {} proposals", static_cast<int>(method), proposals));
    SpeculationOptions o;
    o.method = method;
    o.proposals = proposals;
    o.retrieval = {.budget = 64, .chunk = 4};
    EngineOptions options;
    options.rule = p.rule;
    options.cache = {.block = 16,
                     .bytes = KvCache::entry_bytes(p.gpu, model) * model.config().depth * 6 * kContext};
    options.max_rows = 64;
    options.max_sequences = 4;
    options.prefix_cache = true;
    Engine engine(p.gpu, model, options);
    if (engine.cached_model().whole == nullptr) GTEST_SKIP() << "This GPU has no whole steps.";
    SpeculativeCycles cycles(engine.cached_model(), nullptr, o);
    engine.go_by(&cycles);
    Ids ids = request.prompt;
    const RequestId id = engine.submit(request);
    for (int step = 0; !engine.idle(); ++step) {
      if (step == 12 || step == 30) engine.submit({.prompt = {1, 2, 3}, .max_tokens = 5});
      for (const Event& e : engine.step()) {
        ASSERT_NE(e.finish, Finish::Error) << e.error;
        if (e.request == id && e.has_token) ids.push_back(e.token.id);
      }
    }
    ASSERT_EQ(ids.size(), request.prompt.size() + 90);
    const EngineStats stats = engine.stats();
    EXPECT_EQ(stats.free_blocks, stats.blocks);
    EXPECT_EQ(stats.cycles.plain_texts.size(), 0U);
    EXPECT_GT(stats.cycles.levels.back().tokens, 20);
    EXPECT_GT(stats.whole_steps, 0);
    expect_likeliest(p, ids, request.prompt.size(), "of the engine");
  }
}

std::vector<Case> cases() {
  return {{"dense", 256, 4, 2, 512, true, true, {}},
          {"mod", 256, 4, 2, 512, true, true, depth(CausalMethod::Predictor, 2, Gate::Sigmoid)},
          {"mod_raw", 256, 4, 4, 512, false, false, depth(CausalMethod::Aux, 2, Gate::Raw)}};
}

INSTANTIATE_TEST_SUITE_P(Kinds, CudaSpeculationSteps, ::testing::ValuesIn(cases()),
                         [](const auto& kind) { return kind.param.name; });

}  // namespace
}  // namespace fathom
