// Speculative decoding through the models: greedy texts and texts under shared noise are the target's own,
// token for token in the row-invariant mode, whatever proposes; drawn texts have its distribution; and
// nothing of a text stays in the caches.
#include "infer/speculate/speculation.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>

#include <fmt/format.h>
#include <gmock/gmock.h>

#include "infer/generate.h"
#include "infer/quant/quantize_model.h"
#include "kernels/error.h"
#include "tests/devices.h"
#include "tests/forwarding_backend.h"
#include "tests/infer/all_outcomes.h"
#include "tests/infer/speculation_bench.h"
#include "tests/quant/round_to_nearest.h"

namespace fathom {
namespace {

using namespace speculation_bench;
using namespace tiny_models;

std::vector<Request> requests() {
  std::vector<Request> all;
  all.push_back({.prompt = random_ids(150, 1), .max_tokens = 90});
  all.push_back({.prompt = random_ids(1, 2), .max_tokens = 120});
  all.push_back({.prompt = random_ids(70, 3), .max_tokens = 60, .stop_tokens = {3, 17}});
  all.push_back({.prompt = random_ids(kContext - 9, 4), .max_tokens = 60});
  all.push_back({.prompt = random_ids(kContext, 5), .max_tokens = 60});
  all.push_back({.prompt = random_ids(40, 6), .max_tokens = 70});
  all.back().sampling.repetition_penalty = 1.4;
  all.back().sampling.logit_bias = {{4, 1.0}};
  all.push_back({.prompt = random_ids(40, 7), .max_tokens = 1});
  for (Request& r : all) r.sampling.temperature = 0;
  return all;
}

void expect_greedy_texts(Context& c, const Transformer& model, const Causal& rule, std::size_t count = 99) {
  Bench b(c, model, rule);
  for (std::size_t i = 0; i < std::min(count, requests().size()); ++i) {
    const Request request = requests()[i];
    const Text expected = plain(c, model, rule, request);
    for (const Way& way : ways(skips(model))) {
      SCOPED_TRACE(fmt::format("{}, request {}", way.name, i));
      const Text text = speculate(b, way.options, request);
      ASSERT_EQ(text.ids, expected.ids);
      EXPECT_EQ(text.finish, expected.finish);
      EXPECT_TRUE(b.is_free());
    }
  }
}

class SpeculationKinds : public ::testing::TestWithParam<Case> {};

TEST_P(SpeculationKinds, GreedyTextsAreThoseOfPlainDecoding) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, GetParam().routing, kContext);
  for (const int bits : {16, 8, 4}) {
    SCOPED_TRACE(bits);
    m.model.set_kv_bits(bits);
    expect_greedy_texts(m.c, m.model, m.rule);
    if (HasFailure()) return;
  }
}

/// Chooses as a GPU does, in places not at all: what is asked for then are the logits.
class ChoosingBackend final : public testing_support::ForwardingBackend {
 public:
  ChoosingBackend() : ForwardingBackend(make_cpu_backend({.invariant = true}, 1)) {}
  bool choose_tokens(std::span<TokenPick> picks, ConstView logits, std::int64_t vocab,
                     std::int64_t choices) override {
    if (++calls % 5 == 0) return false;
    const auto* row = static_cast<const float*>(logits.data);
    for (TokenPick& p : picks) {
      EXPECT_EQ(p.temperature, 0);
      p.token = static_cast<std::int32_t>(std::max_element(row, row + choices) - row);
      p.finite = ++rows % 13 != 0;
      if (!p.finite) p.token = 0;
      double sum = 0;
      for (std::int64_t id = 0; id < choices; ++id) sum += std::exp(double{row[id]} - row[p.token]);
      if (p.wants_share) p.share = 1 / sum, ++shares;
      row += vocab;
    }
    return true;
  }
  int calls = 0, rows = 0, shares = 0;
};

TEST_P(SpeculationKinds, GreedyTextsAreTheSameWhereTheDeviceChooses) {
  const auto backend = std::make_shared<ChoosingBackend>();
  Model m(backend, DType::F32, GetParam().routing, kContext);
  expect_greedy_texts(m.c, m.model, m.rule);
  EXPECT_GT(backend->calls, 1000);
  EXPECT_GT(backend->shares, 20);
}

TEST_P(SpeculationKinds, GreedyTextsOfQuantizedTargetsAreThoseOfPlainDecoding) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, GetParam().routing, kContext);
  Quantization q;
  q.bits = 4;
  q.kv = 4;
  const QuantizedModel few = quantize_model(m.c, m.model, q, quant_test::round_to_nearest);
  expect_greedy_texts(m.c, *few.model, m.rule);
}

TEST_P(SpeculationKinds, TextsUnderSharedNoiseDoNotDependOnTheDraft) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, GetParam().routing, kContext);
  Bench b(m.c, m.model, m.rule);
  std::vector<Ids> different;
  for (const std::uint64_t seed : {1U, 2U}) {
    Request request{.prompt = random_ids(130, 1), .max_tokens = 100};
    request.sampling = {.temperature = 0.9, .top_p = 0.95, .presence_penalty = 0.3, .seed = seed};
    Ids first;
    for (Way way : ways(skips(m.model))) {
      SCOPED_TRACE(way.name);
      way.options.tokens = RowRule::Tokens::SharedNoise;
      const Text text = speculate(b, way.options, request);
      if (first.empty()) first = text.ids;
      ASSERT_EQ(text.ids, first);
    }
    different.push_back(first);
  }
  EXPECT_NE(different[0], different[1]);
}

/// Whether the text's last token is one of two that are as good as each other, or hangs on a decision that
/// is.
bool is_near_tie(Model& m, const Ids& text) {
  const Ids before(text.begin(), text.end() - 1);
  std::vector<float> logits = causal_logits(m.c, m.model, before, m.rule);
  logits.erase(logits.begin(), logits.end() - kVocab);
  std::sort(logits.begin(), logits.end(), std::greater<>());
  return logits[0] - logits[1] < 1e-3 || margins(m, before, m.rule).back() < 1e-4;
}

// Elsewhere a row's rounding depends on how many rows a pass has.
TEST_P(SpeculationKinds, InTheFastModeGreedyTextsPartAtNearTiesAlone) {
  Model m(make_cpu_backend({}, 1), DType::F32, GetParam().routing, kContext);
  Bench b(m.c, m.model, m.rule);
  int parted = 0;
  for (std::size_t i = 0; i < 3; ++i) {
    const Request request = requests()[i];
    const Text expected = plain(m.c, m.model, m.rule, request);
    for (const Way& way : ways(skips(m.model))) {
      const Text text = speculate(b, way.options, request);
      const std::size_t same = common_prefix(text.ids, expected.ids);
      if (same == text.ids.size() && same == expected.ids.size()) continue;
      ++parted;
      Ids whole = request.prompt;
      whole.insert(whole.end(), expected.ids.begin(),
                   expected.ids.begin() + static_cast<std::ptrdiff_t>(same));
      whole.push_back(0);
      EXPECT_TRUE(is_near_tie(m, whole)) << way.name << ", request " << i << ", token " << same;
    }
  }
  RecordProperty("parted", parted);
}

INSTANTIATE_TEST_SUITE_P(Kinds, SpeculationKinds, ::testing::ValuesIn(cases()),
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
        if (p[v] <= 0) continue;
        Ids next = text;
        next.push_back(static_cast<std::int32_t>(v));
        longer[next] += weight * p[v];
      }
    }
    open = std::move(longer);
  }
  return open;
}

// The whole of it: models, caches, retrieval and rollback, with all outcomes of all random numbers.
void expect_the_distribution_of_plain_sampling(Model& m, const SamplingOptions& sampling,
                                               std::int64_t tokens = 4) {
  constexpr std::int64_t kFew = 2;  // ids that are chosen
  Bench b(m.c, m.model, m.rule);
  b.target.vocab = b.small.vocab = kFew;
  Request request{.max_tokens = tokens};
  for (std::int32_t i = 0; i < 30; ++i) request.prompt.push_back(i * i % 3 % static_cast<std::int32_t>(kFew));
  request.sampling = sampling;
  const outcomes::Texts expected = sampled_texts(m, kFew, request);
  for (Way way : ways(skips(m.model))) {
    way.options.retrieval = {.budget = 16, .chunk = 2};
    way.options.window = {.sinks = 2, .recent = 6};
    way.options.proposals = std::min<std::int64_t>(way.options.proposals, 2);
    way.options.plain_first = 0;
    if (way.options.proposals == 0) continue;  // the clock decides: no two runs are the same
    outcomes::AllOutcomes chance;
    outcomes::Texts found;
    std::int64_t runs = 0;
    do {
      Speculation s(b.target, &b.small, way.options, request, &chance);
      Ids text;
      for (Finish f = Finish::None; f == Finish::None;) {
        const Speculation::Step step = s.step();
        text.insert(text.end(), step.tokens.begin(), step.tokens.end());
        f = step.finish;
      }
      found[text] += chance.weight();
      ++runs;
    } while (chance.next());
    EXPECT_LT(outcomes::total_variation(found, expected), 1e-9) << way.name;
    if (way.options.method != Method::Plain) {
      EXPECT_GE(runs, std::ssize(expected)) << way.name;
    }
  }
}

const SamplingOptions kCut{.temperature = 1.5, .top_p = 0.97, .presence_penalty = 0.2};
// Nothing but a temperature: the rows may stay on a device.
const SamplingOptions kWhole{.temperature = 1.5};

TEST_P(SpeculationKinds, TextsAreDistributedAsPlainSamplingHasThem) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, GetParam().routing, kContext);
  expect_the_distribution_of_plain_sampling(m, kCut);
}

/// Keeps rows as a GPU does.
class KeepingBackend final : public testing_support::ForwardingBackend {
 public:
  explicit KeepingBackend(const BackendOptions& options = {.invariant = true})
      : ForwardingBackend(make_cpu_backend(options, 1)) {}
  bool keeps_rows() const override { return true; }
  void ask_shares(std::span<ShareQuestion> questions, std::int64_t choices) override {
    ++asked;
    inner().ask_shares(questions, choices);
  }
  std::int64_t asked = 0;
};

TEST_P(SpeculationKinds, TextsAreDistributedSoWhereTheDeviceKeepsRows) {
  const auto backend = std::make_shared<KeepingBackend>();
  Model m(backend, DType::F32, GetParam().routing, kContext);
  expect_the_distribution_of_plain_sampling(m, kWhole);
  EXPECT_GT(backend->asked, 100);
}

// Host and device draw by the same numbers from the same shares, to rounding.
TEST_P(SpeculationKinds, DrawnTextsAreTheSameWhereTheDeviceKeepsRows) {
  const auto backend = std::make_shared<KeepingBackend>();
  Model there(backend, DType::F32, GetParam().routing, kContext);
  Model here(make_cpu_backend({.invariant = true}, 1), DType::F32, GetParam().routing, kContext);
  Bench keeps(there.c, there.model, there.rule), brings(here.c, here.model, here.rule);
  Request request{.prompt = random_ids(90, 1), .max_tokens = 60};
  for (const Way& way : ways(skips(here.model))) {
    if (way.options.proposals == 0) continue;  // the clock decides
    for (const std::uint64_t seed : {1U, 2U}) {
      request.sampling = {.temperature = 0.8, .seed = seed};
      EXPECT_EQ(speculate(keeps, way.options, request).ids, speculate(brings, way.options, request).ids)
          << way.name;
    }
  }
  EXPECT_GT(backend->asked, 100);
}

class CudaSpeculationKinds : public ::testing::TestWithParam<Case> {};

TEST_P(CudaSpeculationKinds, GreedyTextsAreThoseOfPlainDecoding) {
  const testing_support::OpenedDevice opened =
      testing_support::open_device(testing_support::Device::Cuda, {.invariant = true});
  testing_support::skip_without(opened);
  if (!opened.backend) return;
  for (const auto& [dtype, bits] :
       {std::pair{DType::F32, 16}, {DType::BF16, 16}, {DType::BF16, 8}, {DType::BF16, 4}}) {
    SCOPED_TRACE(fmt::format("{} {}", name_of(dtype), bits));
    Model m(opened.backend, dtype, GetParam().routing, kContext);
    m.model.set_kv_bits(bits);
    expect_greedy_texts(m.c, m.model, m.rule, 3);
    if (HasFailure()) return;
  }
}

TEST_P(CudaSpeculationKinds, TextsAreDistributedAsPlainSamplingHasThem) {
  const testing_support::OpenedDevice opened =
      testing_support::open_device(testing_support::Device::Cuda, {.invariant = true});
  testing_support::skip_without(opened);
  if (!opened.backend) return;
  for (const DType dtype : {DType::F32, DType::BF16}) {
    SCOPED_TRACE(name_of(dtype));
    Model m(opened.backend, dtype, GetParam().routing, kContext);
    // Three tokens: a cycle that is refused, and one behind it. A token more takes a GPU minutes.
    if (dtype == DType::F32) expect_the_distribution_of_plain_sampling(m, kCut, 3);
    expect_the_distribution_of_plain_sampling(m, kWhole, 3);
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, CudaSpeculationKinds, ::testing::ValuesIn(cases()),
                         [](const auto& kind) { return kind.param.name; });

// Where levels agree, what is proposed is taken.
TEST(Speculation, TakesWhatALevelThatAgreesProposes) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, depth(CausalMethod::Aux), kContext);
  Bench b(m.c, m.model, m.rule, 5);  // the draft is the target
  Request request{.prompt = random_ids(30, 1), .max_tokens = 84};
  request.sampling.temperature = 1;
  SpeculationOptions o = options_of(Method::Draft, Draft::Model, 5);
  o.window = {.sinks = 8, .recent = 300};
  o.plain_first = 0;
  const Text by_draft = speculate(b, o, request);
  EXPECT_EQ(by_draft.report.levels.back().counts.accepted, by_draft.report.levels.back().counts.tested);
  EXPECT_GT(by_draft.report.tokens_a_pass(), 5);
  o = options_of(Method::Retrieval, Draft::Ngram, 5);
  o.retrieval.budget = 200;
  o.plain_first = 3;  // of which the first does not count
  const Text by_retrieval = speculate(b, o, request);
  EXPECT_GT(by_retrieval.report.tokens_a_pass(), 4);
  EXPECT_EQ(by_retrieval.report.levels[0].name, "retrieval");
  EXPECT_GT(by_retrieval.report.speedup(), 0);
}

void break_numbers(Context& c, const Transformer& model) {
  for (const ParameterSpec& spec : model.parameters().specs()) {
    const Tensor& weight = model.parameters().get(spec.name);
    const std::vector<float> broken(static_cast<std::size_t>(weight.size()), std::nanf(""));
    from_host(c.backend(), weight, broken);
  }
}

// What a broken draft has to say is nothing, and the text is the target's.
TEST(Speculation, ADraftWhoseNumbersAreNotFiniteProposesNothing) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, depth(CausalMethod::Aux), kContext);
  Bench b(m.c, m.model, m.rule);
  break_numbers(b.draft.c, b.draft.model);
  const Request request{.prompt = random_ids(30, 1), .max_tokens = 40, .sampling = {.temperature = 0}};
  const Text text = speculate(b, options_of(Method::Draft, Draft::Model, 5), request);
  EXPECT_EQ(text.ids, plain(m.c, m.model, m.rule, request).ids);
  EXPECT_EQ(text.report.levels.back().counts.proposed, 0);
}

// The same of rows that a device keeps, and of the target's own that is an error.
TEST(Speculation, KeptRowsThatAreNotFiniteAreNoProposalsAndNoTexts) {
  const auto backend = std::make_shared<KeepingBackend>();
  Model m(backend, DType::F32, depth(CausalMethod::Aux), kContext);
  Bench b(m.c, m.model, m.rule);
  const Request request{.prompt = random_ids(30, 1), .max_tokens = 40, .sampling = {.temperature = 1}};
  const SpeculationOptions plain_one = options_of(Method::Plain, Draft::Ngram, 1);
  break_numbers(b.draft.c, b.draft.model);
  for (const Method method : {Method::Draft, Method::Triforce}) {
    const Text text = speculate(b, options_of(method, Draft::Model, 5), request);
    EXPECT_EQ(std::ssize(text.ids), 40);
    EXPECT_EQ(text.report.levels.front().counts.tokens, 0);
  }
  break_numbers(m.c, m.model);
  for (const SpeculationOptions& o : {plain_one, options_of(Method::Ngram, Draft::Ngram, 4)}) {
    try {
      speculate(b, o, request);
      ADD_FAILURE() << "no error";
    } catch (const UserError& e) {
      EXPECT_THAT(e.what(), ::testing::HasSubstr("token 30 of the text are not finite"));
    }
  }
  EXPECT_TRUE(b.is_free());
}

std::int64_t draws(std::int64_t usual) {
  const char* given = std::getenv("FATHOM_SPECULATION_DRAWS");
  return given == nullptr ? usual : std::atoll(given);
}

// Three tokens, by chance: of plain decoding and of each way; a chi-squared of two samples.
void expect_the_draws_of_plain_decoding(std::shared_ptr<Backend> backend, const SamplingOptions& sampling) {
  Model m(std::move(backend), DType::F32, depth(CausalMethod::Predictor), kContext);
  Bench b(m.c, m.model, m.rule);
  const std::int64_t n = draws(400);
  // Long enough for proposals behind the plain passes that some ways begin with.
  Request request{.prompt = random_ids(60, 1), .max_tokens = 9};
  request.sampling = sampling;
  const auto last_ones = [](const Ids& text) { return Ids(text.end() - 3, text.end()); };
  std::map<std::string, std::map<Ids, std::int64_t>> counts;
  for (std::int64_t i = 0; i < n; ++i) {
    request.sampling.seed = static_cast<std::uint64_t>(i);
    const Ids text = plain(m.c, m.model, m.rule, request).ids;
    ++counts["engine"][last_ones(text)];
  }
  for (Way way : ways(true)) {
    way.options.plain_first = 0;
    std::int64_t tested = 0, accepted = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      request.sampling.seed = static_cast<std::uint64_t>(1000000 + i);
      const Text text = speculate(b, way.options, request);
      ++counts[way.name][last_ones(text.ids)];
      tested += text.report.levels.back().counts.tested;
      accepted += text.report.levels.back().counts.accepted;
    }
    if (way.options.method != Method::Plain) {
      EXPECT_GT(accepted, 0) << way.name;
      EXPECT_GT(tested, accepted) << way.name;
    }
    double chi = 0, degrees = -1, rare_a = 0, rare_b = 0;
    const auto add = [&](double x, double y) {
      chi += (x - y) * (x - y) / (x + y);
      ++degrees;
    };
    std::map<Ids, std::int64_t> all = counts["engine"];
    for (const auto& [text, count] : counts[way.name]) all[text] += count;
    for (const auto& [text, count] : all) {
      const auto x = static_cast<double>(counts["engine"][text]),
                 y = static_cast<double>(counts[way.name][text]);
      if (count < 10) {
        rare_a += x, rare_b += y;
      } else {
        add(x, y);
      }
    }
    if (rare_a + rare_b > 0) add(rare_a, rare_b);
    EXPECT_GT(degrees, 2);
    ::testing::Test::RecordProperty(
        way.name, fmt::format("chi-squared {:.1f}, {} degrees, {} of {} proposals taken", chi, degrees,
                              accepted, tested));
    EXPECT_LT(chi, degrees + 4.5 * std::sqrt(2 * degrees)) << way.name << ", " << degrees << " degrees";
  }
}

TEST(Speculation, DrawnTextsHaveTheDistributionOfPlainDecoding) {
  expect_the_draws_of_plain_decoding(make_cpu_backend({}, 1), {.temperature = 0.7, .top_k = 4});
}

// Sharp enough that texts are few.
TEST(Speculation, DrawnTextsHaveItWhereTheDeviceKeepsRows) {
  expect_the_draws_of_plain_decoding(std::make_shared<KeepingBackend>(BackendOptions{}),
                                     {.temperature = 0.35});
}

}  // namespace
}  // namespace fathom
