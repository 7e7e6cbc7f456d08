// What speculative decoding refuses, and what is left where a text is given up, memory ends or a pass fails:
// nothing in the caches, and the target's text.
#include <fmt/format.h>
#include <gmock/gmock.h>

#include "kernels/error.h"
#include "tests/forwarding_backend.h"
#include "tests/infer/speculation_bench.h"

namespace fathom {
namespace {

using namespace speculation_bench;
using namespace tiny_models;
using ::testing::HasSubstr;

TEST(Speculation, NothingStaysOfATextThatIsGivenUp) {
  Model m(make_cpu_backend({}, 1), DType::F32, depth(CausalMethod::Aux), kContext);
  Bench b(m.c, m.model, m.rule);
  for (const Way& way : ways(true)) {
    for (int steps = 0; steps < 4; ++steps) {
      Speculation s(b.target, &b.small, way.options, {.prompt = random_ids(100, 1)});
      for (int i = 0; i < steps; ++i) s.step();
    }
    EXPECT_TRUE(b.is_free()) << way.name;
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

TEST(Speculation, NothingStaysOfATextThatFailsInMidCycle) {
  const auto backend = std::make_shared<FailingBackend>(make_cpu_backend({}, 1));
  Model m(backend, DType::F32, depth(CausalMethod::Aux), kContext);
  Bench b(m.c, m.model, m.rule);
  for (const Way& way : ways(true)) {
    int failed = 0;
    for (std::int64_t at = 3; at < 400; at += 17) {
      backend->left = at;
      try {
        speculate(b, way.options, {.prompt = random_ids(100, 1), .max_tokens = 20});
      } catch (const MemoryError&) {
        ++failed;
      }
      EXPECT_TRUE(b.is_free()) << way.name << " after " << at;
    }
    EXPECT_GT(failed, 3) << way.name;
  }
}

// Levels that find no room say nothing; the text is what it is, until the target itself is at the end of it.
TEST(Speculation, WhereMemoryEndsTheTextIsStillTheTargets) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, depth(CausalMethod::Aux), kContext);
  Request request{.prompt = random_ids(100, 1), .max_tokens = 150};
  request.sampling.temperature = 0;
  const Text expected = plain(m.c, m.model, m.rule, request);
  int whole = 0, cut = 0;
  for (std::int64_t tokens = 120; tokens < 520; tokens += 40) {
    Bench b(m.c, m.model, m.rule, 6, tokens);
    for (const Way& way : ways(true)) {
      SCOPED_TRACE(fmt::format("{} with room for {}", way.name, tokens));
      Ids ids;
      try {
        Speculation s(b.target, &b.small, way.options, request);
        for (Finish f = Finish::None; f == Finish::None;) {
          const Speculation::Step step = s.step();
          ids.insert(ids.end(), step.tokens.begin(), step.tokens.end());
          f = step.finish;
        }
        ++whole;
        EXPECT_EQ(ids, expected.ids);
      } catch (const UserError& e) {
        ++cut;
        EXPECT_THAT(e.what(), HasSubstr("ache ("));
        EXPECT_EQ(ids, Ids(expected.ids.begin(), expected.ids.begin() + std::ssize(ids)));
      }
      EXPECT_TRUE(b.is_free());
    }
  }
  EXPECT_GT(whole, 10);
  EXPECT_GT(cut, 5);
}

// A pass of many rows wants room in every routed layer whatever these keep; what fits row by row is read in
// passes of fewer.
TEST(Speculation, APromptThatFitsRowByRowFits) {
  Model m(make_cpu_backend({.invariant = true}, 1), DType::F32, depth(CausalMethod::Aux), kContext);
  Request request{.prompt = random_ids(200, 1), .max_tokens = 4};
  request.sampling.temperature = 0;
  const Ids expected = plain(m.c, m.model, m.rule, request).ids;
  const auto fits = [&](Bench& b, std::int64_t rows) {
    b.target.max_rows = rows;
    try {
      EXPECT_EQ(speculate(b, options_of(Method::Plain, Draft::Ngram, 1), request).ids, expected);
      return true;
    } catch (const UserError&) {
      return false;
    }
  };
  int tight = 0;
  for (std::int64_t tokens = 120; tokens < 260; tokens += 4) {
    Bench b(m.c, m.model, m.rule, 6, tokens);
    const bool alone = fits(b, 1);
    EXPECT_EQ(fits(b, 200), alone) << tokens;
    const NewRows all{b.cache.add(), 200};
    tight += alone && !b.cache.fits({&all, 1}) ? 1 : 0;
  }
  EXPECT_GT(tight, 0);
}

void expect_refused(Bench& b, const SpeculationOptions& o, const Request& request, const std::string& why) {
  try {
    const Speculation s(b.target, &b.small, o, request);
    ADD_FAILURE() << "no error: " << why;
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), HasSubstr(why));
  }
  EXPECT_TRUE(b.is_free());
}

TEST(Speculation, SaysWhatCannotBe) {
  Model m(make_cpu_backend({}, 1), DType::F32, depth(CausalMethod::Aux), kContext);
  Bench b(m.c, m.model, m.rule);
  const Request request{.prompt = random_ids(30, 1), .max_tokens = 10};
  SpeculationOptions o = options_of(Method::Retrieval, Draft::Ngram, 4);
  o.retrieval.budget = kContext;
  expect_refused(b, o, request, "leaves nothing out of this model's context of 400");
  o.retrieval = {.budget = 24, .chunk = 8};
  expect_refused(b, o, request, "less than four chunks of 8");
  o = options_of(Method::Retrieval, Draft::Ngram, 17);
  expect_refused(b, o, request, "number of proposals");
  o = options_of(Method::Ngram, Draft::Ngram, 4);
  expect_refused(b, o, {.prompt = {}}, "prompt is empty");
  expect_refused(b, o, {.prompt = {99}}, "outside the vocabulary");
  expect_refused(b, o, {.prompt = {1}, .logprobs = true}, "log-probabilities");
  o = options_of(Method::Retrieval, Draft::Ngram, 4);
  Bench narrow(m.c, m.model, m.rule, 6, 24);
  expect_refused(narrow, o, request, "has no room for 40 entries that are retrieved beside the 30 tokens");

  o = options_of(Method::Draft, Draft::SelfSkip, 4);
  Model dense(make_cpu_backend({}, 1), DType::F32, {}, kContext);
  Bench of_dense(dense.c, dense.model, dense.rule);
  expect_refused(of_dense, o, request, "no routed blocks");
  RoutingConfig everywhere = depth(CausalMethod::Aux, 1);
  everywhere.first = 0;
  Model routed(make_cpu_backend({}, 1), DType::F32, everywhere, kContext);
  Bench of_routed(routed.c, routed.model, routed.rule);
  expect_refused(of_routed, o, request, "All blocks of this model are routed");

  o = options_of(Method::Draft, Draft::Model, 4);
  Model short_draft(make_cpu_backend({}, 1), DType::F32, {}, 35);
  KvCache cache(short_draft.c, short_draft.model, cache_of(short_draft.c, short_draft.model, 64));
  const CachedModel small{short_draft.c, short_draft.model, {}, cache, kVocab, 50};
  try {
    const Speculation s(b.target, &small, o, request);
    ADD_FAILURE() << "no error";
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), HasSubstr("The draft's context is 35 tokens, and this text may come to 40"));
  }
}

}  // namespace
}  // namespace fathom
