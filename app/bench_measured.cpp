// Measured lines of `fathom bench speculative`: a trained model over prompts of a text, plainly and by
// levels.
#include <algorithm>
#include <fstream>
#include <iterator>

#include <fmt/format.h>

#include "app/bench_speculative.h"
#include "app/engine_flags.h"
#include "app/speculation_room.h"
#include "app/trained_model.h"
#include "kernels/error.h"
#include "src/core/stopwatch.h"
#include "src/model/model_tokenizer.h"

namespace fathom::app {

namespace {

std::vector<std::int32_t> read_ids(const std::string& path, const Tokenizer& tokenizer) {
  std::ifstream in(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  if (!in.good() && !in.eof()) throw UserError(fmt::format("Cannot read {}.", path));
  if (text.empty()) throw UserError(fmt::format("{} cannot be read, or is empty.", path));
  return tokenizer.encode(text);
}

/// Prompts of `context` tokens from evenly spread places.
std::vector<Request> requests_of(const std::vector<std::int32_t>& ids, const SpeculativeBenchFlags& flags,
                                 std::int64_t context) {
  const auto size = std::ssize(ids);
  if (size < context + flags.texts - 1)
    throw UserError(fmt::format("{} has {} tokens: too few for {} prompts of {}.", flags.text, size,
                                flags.texts, context),
                    "Give a longer text, or ask for shorter prompts.");
  std::vector<Request> all;
  for (std::int64_t i = 0; i < flags.texts; ++i) {
    const std::int64_t first = flags.texts == 1 ? 0 : i * (size - context) / (flags.texts - 1);
    Request r;
    r.prompt.assign(ids.begin() + first, ids.begin() + first + context);
    r.max_tokens = flags.tokens;
    r.sampling.temperature = flags.temperature;
    r.sampling.seed = static_cast<std::uint64_t>(1 + i);
    all.push_back(std::move(r));
  }
  return all;
}

/// Seconds a token of plain decoding, one text after the other, behind each text's first.
double plainly(const SpeculativeText& text, const std::vector<Request>& requests, std::int64_t vocab) {
  EngineOptions options = text.engine.options(*text.model.context, *text.model.loaded.model, 1);
  options.rule = text.rule;
  options.vocab = vocab;
  Engine engine(*text.model.context, *text.model.loaded.model, options);
  double seconds = 0;
  std::int64_t tokens = 0;
  const auto until_token = [&] {
    while (!engine.idle()) {
      for (const Event& e : engine.step()) {
        if (e.finish == Finish::Error) throw UserError(e.error);
        if (e.has_token) return;
      }
    }
  };
  for (const Request& request : requests) {
    const std::int64_t before = engine.stats().decoded_tokens;
    engine.submit(request);
    until_token();
    const Stopwatch watch;
    while (!engine.idle()) until_token();
    seconds += watch.seconds();
    tokens += engine.stats().decoded_tokens - before - 1;
  }
  return seconds / static_cast<double>(std::max<std::int64_t>(1, tokens));
}

void add(SpeculationReport& sum, const SpeculationReport& more) {
  sum.seconds += more.seconds;
  sum.tokens += more.tokens;
  if (sum.levels.empty()) {
    sum.levels = more.levels;
    return;
  }
  for (std::size_t i = 0; i < sum.levels.size(); ++i) {
    LevelCounts& a = sum.levels[i].counts;
    const LevelCounts& b = more.levels[i].counts;
    a.passes += b.passes, a.proposed += b.proposed, a.tested += b.tested, a.accepted += b.accepted;
    a.tokens += b.tokens, a.seconds += b.seconds, a.settle_seconds += b.settle_seconds;
    a.plain_passes += b.plain_passes, a.plain_seconds += b.plain_seconds;
    sum.levels[i].gatherings += more.levels[i].gatherings;
  }
}

}  // namespace

void bench_measured(const SpeculativeBenchFlags& flags, const Globals& globals) {
  const DecodeFlags& how = flags.model;
  const TrainedModel model = open_model(flags.run, {.invariant = how.invariant}, globals,
                                        how.precision.empty() ? "auto" : how.precision);
  if (how.kv < 16) model.loaded.model->set_kv_bits(how.kv);
  const Transformer& transformer = *model.loaded.model;
  const ModelConfig& m = transformer.config();
  const std::unique_ptr<Tokenizer> tokenizer = tokenizer_of(model.loaded);
  const std::vector<std::int32_t> ids = read_ids(flags.text, *tokenizer);
  const RoutingConfig& routing = model.loaded.config.routing;
  SpeculativeText text{.model = model,
                       .rule = routing.kind != RoutingKind::None ? causal_rule(routing) : Causal{},
                       .tokenizer = tokenizer.get(),
                       .prompt = {},
                       .stops = {},
                       .request = {},
                       .engine = {.block = how.block, .chunk = how.chunk},
                       .precision = how.precision.empty() ? "auto" : how.precision};
  for (const std::int64_t context : flags.contexts) {
    if (context + flags.tokens > m.max_seq_len)
      throw UserError(fmt::format("Prompts of {} and {} new tokens are more than the model's context of {}.",
                                  context, flags.tokens, m.max_seq_len),
                      "Ask for less, or take a model of a longer context.");
    const std::vector<Request> requests = requests_of(ids, flags, context);
    const double plain = plainly(text, requests, std::min(m.vocab_size, tokenizer->vocab_size()));
    for (const std::string& method : flags.methods) {
      SpeculationFlags levels = flags.levels;
      levels.method = method;
      if (method == "retrieval" || method == "ngram") levels.draft.clear();
      const SpeculationRoom room(levels, text);
      SpeculationOptions options = room.options();
      options.plain_first = 0;
      SpeculationReport report;
      for (const Request& request : requests) {
        Speculation speculation(room.target(), room.draft(), options, request);
        while (speculation.step().finish == Finish::None) {
        }
        add(report, speculation.report());
      }
      nlohmann::json line = {{"bench", "speculative"},
                             {"kind", "measured"},
                             {"device", model.context->backend().description()},
                             {"model", flags.run},
                             {"routed", routing.routes_depth()},
                             {"context", context},
                             {"texts", flags.texts},
                             {"kv_heads", m.kv_heads},
                             {"kv", transformer.kv_bits()},
                             {"invariant", how.invariant},
                             {"method", method},
                             {"draft", draft_name(options, levels)},
                             {"gamma", levels.proposals},
                             {"gamma_between", options.proposals_between},
                             {"retrieval_budget", options.retrieval.budget},
                             {"retrieval_chunk", options.retrieval.chunk},
                             {"temperature", flags.temperature}};
      print_speculative(std::move(line), report, plain, globals);
    }
  }
}

}  // namespace fathom::app
