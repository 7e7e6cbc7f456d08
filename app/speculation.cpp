#include "app/speculation.h"

#include <charconv>
#include <iostream>
#include <memory>
#include <optional>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "infer/text_stream.h"
#include "kernels/error.h"
#include "src/core/stopwatch.h"
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

SpeculationOptions options_of(const SpeculationFlags& flags, const Transformer& model) {
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

void require_same_tokenizer(const SpeculativeText& text, const SpeculationFlags& flags,
                            const LoadedModel& draft) {
  const LoadedModel& target = text.model.loaded;
  const std::string ours = text.tokenizer != nullptr ? text.tokenizer->hash() : target.meta.tokenizer_hash;
  std::string theirs = draft.meta.tokenizer_hash;
  if (theirs.empty() && text.tokenizer != nullptr) theirs = tokenizer_of(draft)->hash();
  if (!ours.empty() && ours == theirs) return;
  throw UserError(
      fmt::format("The draft {} has the tokenizer {}, and {} has {}: a draft proposes ids, so both need "
                  "the same.",
                  flags.draft, theirs.empty() ? "of nobody's knowledge" : theirs, target.checkpoint.string(),
                  ours.empty() ? "one that is not known" : ours),
      "Train a draft on a store of the same tokenizer, or draft by self-skip or ngram.");
}

/// A draft that is a model, and its cache.
struct SmallModel {
  SmallModel(const SpeculationFlags& flags, const SpeculativeText& text, const Globals& globals)
      : trained(open_model(flags.draft, {.invariant = text.invariant}, globals, text.precision)) {
    require_same_tokenizer(text, flags, trained.loaded);
    const RoutingConfig& routing = trained.loaded.config.routing;
    if (routing.kind != RoutingKind::None) rule = causal_rule(routing);
    Context& c = *trained.context;
    const Transformer& model = *trained.loaded.model;
    // The window before it moves, and the one after.
    const std::int64_t tokens = 2 * flags.sinks + 3 * flags.window + 2 * kMostVerified;
    const std::int64_t blocks = tokens / text.engine.block + 3;
    cache.emplace(c, model,
                  KvCacheOptions{.block = text.engine.block,
                                 .bytes = KvCache::entry_bytes(c, model) * text.engine.block * blocks *
                                          (model.config().depth + 1)});
    cached.emplace(CachedModel{c, model, rule, *cache, model.config().vocab_size, text.engine.chunk});
  }

  TrainedModel trained;
  Causal rule;
  std::optional<KvCache> cache;
  std::optional<CachedModel> cached;
};

/// What came, and when.
struct Answer {
  std::vector<std::int32_t> ids;
  std::string finish;
  double first_seconds = 0, last_seconds = 0;  // of the first token, and of the last
  std::size_t first_tokens = 0;                // that came with the first
};

nlohmann::json json_of(const SpeculationReport& report, const std::string& method) {
  nlohmann::json levels = nlohmann::json::array();
  for (const LevelReport& l : report.levels) {
    const LevelCounts& n = l.counts;
    nlohmann::json level = {{"name", l.name},      {"passes", n.passes},     {"proposed", n.proposed},
                            {"tested", n.tested},  {"accepted", n.accepted}, {"tokens", n.tokens},
                            {"seconds", n.seconds}};
    level["acceptance"] =
        n.tested > 0 ? nlohmann::json(static_cast<double>(n.accepted) / static_cast<double>(n.tested))
                     : nullptr;
    if (l.gatherings > 0) level["gatherings"] = l.gatherings;
    levels.push_back(std::move(level));
  }
  nlohmann::json json = {{"method", method},
                         {"levels", levels},
                         {"tokens_per_verification", report.tokens_a_pass()},
                         {"decode_seconds", report.seconds}};
  json["estimated_speedup"] = report.speedup() > 0 ? nlohmann::json(report.speedup()) : nullptr;
  return json;
}

void summarise(const SpeculationReport& report) {
  std::string line = fmt::format("{} tokens in {} verifications, {:.2f} each", report.tokens,
                                 report.levels.back().counts.passes, report.tokens_a_pass());
  for (std::size_t i = 1; i < report.levels.size(); ++i) {
    const LevelCounts& n = report.levels[i].counts;
    line += fmt::format("; {} took {} of {} tested proposals of {}", report.levels[i].name, n.accepted,
                        n.tested, report.levels[i - 1].name);
    if (n.tested > 0)
      line +=
          fmt::format(" ({:.0f} %)", 100.0 * static_cast<double>(n.accepted) / static_cast<double>(n.tested));
  }
  if (report.speedup() > 0)
    line += fmt::format("; about {:.2f} times plain decoding's speed", report.speedup());
  spdlog::info("{}", line);
}

}  // namespace

void generate_by_speculation(const SpeculationFlags& flags, const SpeculativeText& text,
                             const Globals& globals) {
  Context& c = *text.model.context;
  const Transformer& model = *text.model.loaded.model;
  SpeculationOptions options = options_of(flags, model);
  EngineOptions engine = text.engine.options(c, model, 1);
  if (text.engine.cache_gb <= 0) {
    const std::int64_t blocks = tokens_beside(options) / text.engine.block + 1;
    engine.cache.bytes +=
        KvCache::entry_bytes(c, model) * text.engine.block * blocks * (model.config().depth + 1);
  }
  const bool has_model = (options.method == Method::Triforce || options.method == Method::Draft) &&
                         options.draft == Draft::Model;
  std::optional<SmallModel> small;
  if (has_model) {
    SpeculativeText for_draft = text;
    for_draft.engine.chunk = engine.max_rows;
    small.emplace(flags, for_draft, globals);
  }
  KvCache cache(c, model, engine.cache);
  const std::int64_t all = model.config().vocab_size;
  const std::int64_t vocab = text.tokenizer != nullptr ? std::min(all, text.tokenizer->vocab_size()) : all;
  std::unique_ptr<WholeStep> whole;
  try {
    whole = WholeStep::open(c, model, text.rule, cache, vocab, 1);
  } catch (const MemoryError&) {
    // The cache has taken it all: op by op is slower and needs nothing of its own.
  }
  const CachedModel target{c, model, text.rule, cache, vocab, engine.max_rows, whole.get()};

  const Stopwatch watch;
  Speculation speculation(target, small ? &*small->cached : nullptr, options, text.request);
  if (!globals.json) std::cout << text.prompt << std::flush;
  std::optional<TextStream> stream;
  if (text.tokenizer != nullptr) stream.emplace(*text.tokenizer, text.stops);
  Answer a;
  while (a.finish.empty()) {
    const Speculation::Step step = speculation.step();
    a.last_seconds = watch.seconds();
    if (a.first_tokens == 0) a.first_seconds = a.last_seconds, a.first_tokens = step.tokens.size();
    a.finish = name_of(step.finish);
    for (const std::int32_t id : step.tokens) {
      a.ids.push_back(id);
      if (!stream) continue;
      const std::string news = stream->add(id);
      if (!globals.json) std::cout << news << std::flush;
      if (!stream->stopped()) continue;
      a.finish = name_of(Finish::Stop);  // what was chosen behind it is nobody's
      break;
    }
  }
  const SpeculationReport report = speculation.report();
  if (!globals.json) {
    if (stream && !stream->stopped()) std::cout << stream->rest();
    std::cout << (stream ? "" : fmt::format("{}", fmt::join(a.ids, ","))) << "\n" << std::flush;
    summarise(report);
    return;
  }
  nlohmann::json json = {
      {"tokens", a.ids}, {"finish_reason", a.finish}, {"prompt_tokens", text.request.prompt.size()}};
  const double decoded = static_cast<double>(a.ids.size()) - static_cast<double>(a.first_tokens);
  json["prefill_tokens_per_s"] =
      a.ids.empty() ? nlohmann::json(nullptr)
                    : nlohmann::json(static_cast<double>(text.request.prompt.size()) / a.first_seconds);
  json["decode_tokens_per_s"] =
      decoded > 0 ? nlohmann::json(decoded / (a.last_seconds - a.first_seconds)) : nullptr;
  json["text"] = stream ? nlohmann::json(stream->text()) : nullptr;
  if (!text.prompt.empty()) json["prompt"] = text.prompt;
  if (const auto layers = model.routed_layers(); !layers.empty()) {
    json["routed_layers"] = layers;
    json["routed_fraction"] = speculation.routed_fraction();
  }
  json["speculation"] = json_of(report, flags.method);
  std::cout << json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
}

void add_speculation_flags(CLI::App& sub, SpeculationFlags& flags) {
  sub.add_option(
         "--speculate", flags.method,
         "triforce | retrieval | draft | ngram: several tokens a pass of the model, distributed as without "
         "it; plain: none, to compare with")
      ->check(CLI::IsMember({"triforce", "retrieval", "draft", "ngram", "plain"}));
  sub.add_option(
      "--draft", flags.draft,
      "With --speculate triforce or draft: self-skip (the model without its routed blocks), ngram, or a "
      "model of the same tokenizer; default: self-skip where there are routed blocks, else ngram");
  sub.add_option(
         "--retrieval-budget", flags.budget,
         "Entries a layer that are retrieved; default: 4096, or a quarter of the context where that is less")
      ->check(number_from_to(1, 1e9));
  sub.add_option("--retrieval-chunk", flags.chunk, "Neighbours that are retrieved together")
      ->capture_default_str()
      ->check(number_from_to(1, 1024));
  sub.add_option(
         "--gamma", flags.proposals,
         "Proposals a pass of the model, 1 to 16; auto: as many as pay, by what passes took and what was "
         "accepted, none included")
      ->capture_default_str()
      ->check(CLI::Validator(
          [](const std::string& value) {
            std::int64_t n = 0;
            const char* end = value.data() + value.size();
            const auto [stop, error] = std::from_chars(value.data(), end, n);
            const bool is_number = error == std::errc() && stop == end && n >= 1 && n <= 16;
            return value == "auto" || is_number
                       ? std::string()
                       : fmt::format("'{}' is neither auto nor a number from 1 to 16", value);
          },
          "1 - 16 | auto"));
  sub.add_option("--gamma-between", flags.proposals_between,
                 "With triforce and a number as --gamma: proposals a pass over what was retrieved")
      ->capture_default_str()
      ->check(number_from_to(1, 8));
  sub.add_option("--draft-window", flags.window, "Latest tokens that a draft sees, at least")
      ->capture_default_str()
      ->check(number_from_to(1, 1e6));
  sub.add_option("--draft-sinks", flags.sinks, "First tokens that it sees")
      ->capture_default_str()
      ->check(number_from_to(0, 1e6));
  sub.add_option(
         "--coupling", flags.coupling,
         "ratio: proposals are taken by the ratio of probabilities | gumbel: by noise of (seed, position) "
         "that all levels share, so that the text does not depend on the draft")
      ->capture_default_str()
      ->check(CLI::IsMember({"ratio", "gumbel"}));
}

void check_speculation_flags(const CLI::App& sub, const SpeculationFlags& flags) {
  for (const char* name : {"--draft", "--retrieval-budget", "--retrieval-chunk", "--gamma", "--gamma-between",
                           "--draft-window", "--draft-sinks", "--coupling"}) {
    if (!flags.asked() && sub.count(name) > 0)
      throw UsageError(fmt::format("{} goes with --speculate.", name),
                       "Say how: --speculate triforce, for one.");
  }
  const bool drafts = flags.method == "triforce" || flags.method == "draft";
  if (flags.asked() && !drafts && sub.count("--draft") > 0)
    throw UsageError(fmt::format("--speculate {} has no use for --draft.", flags.method),
                     "Take --speculate triforce or draft, or leave it out.");
}

}  // namespace fathom::app
