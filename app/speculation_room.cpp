#include "app/speculation_room.h"

#include <algorithm>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/model/model_tokenizer.h"

namespace fathom::app {

namespace {

using Method = SpeculationOptions::Method;
using Draft = SpeculationOptions::Draft;

Method method_of(const std::string& name) {
  if (name == "triforce") return Method::Triforce;
  if (name == "retrieval") return Method::Retrieval;
  if (name == "draft") return Method::Draft;
  return name == "ngram" ? Method::Ngram : Method::Plain;
}

bool can_skip(const Transformer& model) {
  const auto routed = static_cast<std::int64_t>(model.routed_layers().size());
  return routed > 0 && routed < model.config().depth;
}

}  // namespace

SpeculationOptions speculation_options(const SpeculationFlags& flags, const Transformer& model) {
  SpeculationOptions o;
  o.method = method_of(flags.method);
  if (flags.draft.empty()) {
    o.draft = can_skip(model) ? Draft::SelfSkip : Draft::Ngram;
    if (o.method == Method::Draft && o.draft == Draft::Ngram)
      throw UsageError(
          "--speculate draft wants a draft, and this model has no routed blocks that it could skip.",
          "Give --draft MODEL, or take --speculate ngram.");
  } else {
    o.draft = flags.draft == "self-skip" ? Draft::SelfSkip
              : flags.draft == "ngram"   ? Draft::Ngram
                                         : Draft::Model;
  }
  const std::int64_t usual =
      std::min<std::int64_t>(4096, std::max(4 * flags.chunk, model.config().max_seq_len / 4));
  o.retrieval = {.budget = flags.budget > 0 ? flags.budget : usual, .chunk = flags.chunk};
  o.window = {.sinks = flags.sinks, .recent = flags.window};
  o.proposals = flags.proposals == "auto" ? 0 : std::stoll(flags.proposals);
  o.proposals_between = flags.proposals_between;
  if (flags.coupling == "gumbel") o.tokens = RowRule::Tokens::SharedNoise;
  return o;
}

namespace {

void require_same_tokenizer(const SpeculationFlags& flags, const DraftModel::Setting& setting,
                            const LoadedModel& draft) {
  const LoadedModel& target = setting.target;
  const Tokenizer* tokenizer = setting.tokenizer;
  const std::string ours = tokenizer != nullptr ? tokenizer->hash() : target.meta.tokenizer_hash;
  std::string theirs = draft.meta.tokenizer_hash;
  if (theirs.empty() && tokenizer != nullptr) theirs = tokenizer_of(draft)->hash();
  if (!ours.empty() && ours == theirs) return;
  throw UserError(
      fmt::format("The draft {} has the tokenizer {}, and {} has {}: a draft proposes ids, so both need "
                  "the same.",
                  flags.draft, theirs.empty() ? "of nobody's knowledge" : theirs, target.checkpoint.string(),
                  ours.empty() ? "one that is not known" : ours),
      "Train a draft on a store of the same tokenizer, or draft by self-skip or ngram.");
}

}  // namespace

std::unique_ptr<WholeStep> open_steps(Context& c, const Transformer& model, const Causal& rule,
                                      KvCache& cache, std::int64_t vocab, std::int64_t texts) {
  constexpr std::int64_t kSequences = 4;  // of a cache: a text, what was chosen of it, and its successor
  try {
    return WholeStep::open(c, model, rule, cache, vocab, texts * kSequences);
  } catch (const MemoryError&) {
    return nullptr;  // the cache has taken it all: op by op is slower and needs nothing of its own
  }
}

std::string draft_name(const SpeculationOptions& options, const SpeculationFlags& flags) {
  if (options.method != Method::Triforce && options.method != Method::Draft) return "";
  return options.draft == Draft::SelfSkip ? "self-skip"
         : options.draft == Draft::Ngram  ? "ngram"
                                          : flags.draft;
}

KvCacheOptions window_cache(const Context& c, const Transformer& model, const Window& window,
                            std::int64_t block) {
  const std::int64_t tokens = 2 * window.sinks + 3 * window.recent + 2 * kMostVerified;
  return {
      .block = block,
      .bytes = KvCache::entry_bytes(c, model) * block * (tokens / block + 3) * (model.config().depth + 1)};
}

bool wants_model(const SpeculationOptions& options) {
  return options.drafts() && options.draft == Draft::Model;
}

std::int64_t bytes_beside(const Context& c, const Transformer& model, const SpeculationOptions& options,
                          std::int64_t block, std::int64_t texts) {
  const std::int64_t blocks = tokens_beside(options) / block + 1;
  return texts * KvCache::entry_bytes(c, model) * block * blocks * (model.config().depth + 1);
}

DraftModel::DraftModel(const SpeculationFlags& flags, const Setting& setting)
    : trained_(open_model_beside(setting.backend, flags.draft, setting.precision)) {
  require_same_tokenizer(flags, setting, trained_.loaded);
  const RoutingConfig& routing = trained_.loaded.config.routing;
  if (routing.kind != RoutingKind::None) rule_ = causal_rule(routing);
  Context& c = *trained_.context;
  const Transformer& model = *trained_.loaded.model;
  KvCacheOptions options =
      window_cache(c, model, {.sinks = flags.sinks, .recent = flags.window}, setting.block);
  options.bytes *= setting.texts;
  cache_.emplace(c, model, options);
  const std::int64_t vocab = model.config().vocab_size;
  whole_ = open_steps(c, model, rule_, *cache_, vocab, setting.texts);
  passes_ = ShortPasses::open(c, model, rule_, *cache_);
  cached_.emplace(
      CachedModel{c, model, rule_, *cache_, vocab, setting.chunk, whole_.get(), nullptr, passes_.get()});
}

SpeculationRoom::SpeculationRoom(const SpeculationFlags& flags, const SpeculativeText& text)
    : options_(speculation_options(flags, *text.model.loaded.model)) {
  Context& c = *text.model.context;
  const Transformer& model = *text.model.loaded.model;
  EngineOptions engine = text.engine.options(c, model, 1);
  if (text.engine.cache_gb <= 0) engine.cache.bytes += bytes_beside(c, model, options_, text.engine.block, 1);
  if (wants_model(options_))
    draft_.emplace(flags, DraftModel::Setting{.target = text.model.loaded,
                                              .tokenizer = text.tokenizer,
                                              .backend = c.shared_backend(),
                                              .precision = text.precision,
                                              .block = text.engine.block,
                                              .chunk = engine.max_rows});
  cache_.emplace(c, model, engine.cache);
  const std::int64_t all = model.config().vocab_size;
  const std::int64_t vocab = text.tokenizer != nullptr ? std::min(all, text.tokenizer->vocab_size()) : all;
  whole_ = open_steps(c, model, text.rule, *cache_, vocab);
  passes_ = ShortPasses::open(c, model, text.rule, *cache_);
  target_.emplace(CachedModel{c, model, text.rule, *cache_, vocab, engine.max_rows, whole_.get(), nullptr,
                              passes_.get()});
}

}  // namespace fathom::app
