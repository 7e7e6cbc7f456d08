// What the tests of speculative decoding through models have in common: a target, a draft, their caches, and
// all ways to speculate.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "infer/engine.h"
#include "infer/speculate/speculation.h"
#include "tests/infer/tiny_models.h"
#include "tests/infer/ways_to_speculate.h"

namespace fathom::speculation_bench {

using namespace tiny_models;
using Ids = std::vector<std::int32_t>;
using Method = SpeculationOptions::Method;
using Draft = SpeculationOptions::Draft;

inline constexpr std::int64_t kContext = 400;

using testing_support::skips;
using testing_support::Way;

inline SpeculationOptions options_of(Method method, Draft draft, std::int64_t proposals,
                                     std::int64_t between = 1) {
  return testing_support::way_of(method, draft, proposals, between);
}

inline std::vector<Way> ways(bool self_skips) {
  std::vector<Way> all = {{"plain", options_of(Method::Plain, Draft::Ngram, 1)},
                          {"ngram", options_of(Method::Ngram, Draft::Ngram, 4)},
                          {"retrieval", options_of(Method::Retrieval, Draft::Ngram, 6)},
                          {"retrieval_auto", options_of(Method::Retrieval, Draft::Ngram, 0)},
                          {"draft", options_of(Method::Draft, Draft::Model, 3)},
                          {"triforce_model", options_of(Method::Triforce, Draft::Model, 6, 2)},
                          {"triforce_auto", options_of(Method::Triforce, Draft::Model, 0)},
                          {"triforce_ngram", options_of(Method::Triforce, Draft::Ngram, 5, 3)}};
  if (self_skips) {
    all.push_back({"self_skip", options_of(Method::Draft, Draft::SelfSkip, 4)});
    all.push_back({"triforce_self_skip", options_of(Method::Triforce, Draft::SelfSkip, 6, 1)});
  }
  return all;
}

inline KvCacheOptions cache_of(Context& c, const Transformer& model, std::int64_t tokens) {
  return {.block = 16, .bytes = KvCache::entry_bytes(c, model) * tokens * 5};
}

/// A target, a draft, and their caches.
struct Bench {
  Context& c;
  const Transformer& model;
  Model draft;
  KvCache cache, draft_cache;
  std::unique_ptr<ShortPasses> passes;
  CachedModel target, small;

  Bench(Context& context, const Transformer& of, const Causal& rule, std::uint64_t draft_seed = 6,
        std::int64_t tokens = 2 * kContext)
      : c(context),
        model(of),
        draft(context.shared_backend(), context.compute_dtype(), depth(CausalMethod::Aux), kContext,
              draft_seed),
        cache(c, model, cache_of(c, model, tokens)),
        draft_cache(draft.c, draft.model, cache_of(draft.c, draft.model, kContext)),
        passes(ShortPasses::open(c, model, rule, cache, true)),
        target{c, model, rule, cache, kVocab, 50, nullptr, nullptr, passes.get()},
        small{draft.c, draft.model, draft.rule, draft_cache, kVocab, 50} {}

  bool is_free() const {
    return cache.pool().free_groups() == cache.pool().groups() &&
           draft_cache.pool().free_groups() == draft_cache.pool().groups();
  }
};

struct Text {
  Ids ids;
  Finish finish = Finish::None;
  SpeculationReport report;
};

inline Text speculate(Bench& b, const SpeculationOptions& o, const Request& request) {
  Text text;
  Speculation s(b.target, &b.small, o, request);
  while (text.finish == Finish::None) {
    const Speculation::Step step = s.step();
    text.ids.insert(text.ids.end(), step.tokens.begin(), step.tokens.end());
    text.finish = step.finish;
  }
  text.report = s.report();
  return text;
}

inline Text plain(Context& c, const Transformer& model, const Causal& rule, const Request& request) {
  EngineOptions o;
  o.rule = rule;
  o.cache = cache_of(c, model, 2 * kContext);
  o.vocab = kVocab;
  Engine engine(c, model, o);
  engine.submit(request);
  Text text;
  while (!engine.idle()) {
    for (const Event& e : engine.step()) {
      if (e.has_token) text.ids.push_back(e.token.id);
      text.finish = e.finish;
    }
  }
  return text;
}

inline Ids random_ids(std::int64_t n, unsigned seed) {
  std::mt19937_64 r(seed);
  Ids ids(static_cast<std::size_t>(n));
  for (std::int32_t& id : ids) id = static_cast<std::int32_t>(r() % kVocab);
  return ids;
}

}  // namespace fathom::speculation_bench
