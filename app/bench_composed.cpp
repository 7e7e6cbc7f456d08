// Composed lines of `fathom bench speculative`: a random model, over a cache of random numbers.
#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>

#include <fmt/format.h>

#include "app/bench_speculative.h"
#include "app/forced_level.h"
#include "app/speculation_room.h"
#include "app/trained_model.h"
#include "infer/speculate/ngram_level.h"
#include "infer/speculate/window_level.h"
#include "kernels/error.h"
#include "src/config/resolve.h"
#include "src/core/stopwatch.h"

namespace fathom::app {

namespace {

constexpr std::int64_t kWarmUp = 3;  // cycles

/// A random dense model as a draft.
struct RandomDraft {
  std::unique_ptr<Context> c;
  std::unique_ptr<Transformer> model;
  std::optional<KvCache> cache;
  std::unique_ptr<WholeStep> whole;
  std::unique_ptr<ShortPasses> passes;
  std::optional<CachedModel> cached;

  RandomDraft(const SpeculativeBenchFlags& flags, const std::string& preset, const EngineBench& s) {
    BenchModel of = flags.model.model;
    of.preset = preset;
    of.variant = "dense";
    Config config = bench_model(of);
    config.model.max_seq_len = s.config.model.max_seq_len;
    config.train.steps = 1;
    config = resolve(config);
    c = inference_context(s.backend, s.config.train.precision);
    model = std::make_unique<Transformer>(*c, config.model, config.routing, false);
    model->initialise(*c, 2);
    const Window window{.sinks = flags.levels.sinks, .recent = flags.levels.window};
    cache.emplace(*c, *model, window_cache(*c, *model, window, flags.model.block));
    const std::int64_t vocab = config.model.vocab_size;
    whole = open_steps(*c, *model, Causal{}, *cache, vocab);
    passes = ShortPasses::open(*c, *model, Causal{}, *cache);
    cached.emplace(CachedModel{*c, *model, Causal{}, *cache, vocab, s.options.max_rows, whole.get(), nullptr,
                               passes.get()});
  }
};

/// What is decoded, and against what.
struct Plain {
  double seconds = 0;
  double kept = 0;
  bool is_whole = false;
};

SpeculationFlags with(const SpeculativeBenchFlags& flags, const std::string& method) {
  SpeculationFlags f = flags.levels;
  f.method = method;
  if (method == "retrieval" || method == "ngram") f.draft.clear();
  if (f.draft.empty() && (method == "draft" || method == "triforce") &&
      flags.model.model.variant.starts_with("dense"))
    f.draft = "d4";
  return f;
}

double given(const SpeculativeBenchFlags& flags, std::size_t which, const std::string& method) {
  if (which < flags.acceptance.size()) return flags.acceptance[which];
  throw UsageError(fmt::format("--acceptance has {} numbers, and --speculate {} needs number {}.",
                               flags.acceptance.size(), method, which + 1),
                   "They are: retrieval's by the model, a draft's by the model, a draft's by retrieval.");
}

/// One method's levels over a text that is assumed to be there.
class Composition {
 public:
  Composition(const SpeculativeBenchFlags& flags, const std::string& method, const EngineBench& s,
              const CachedModel& target, const Plain& plain, std::int64_t context)
      : options_(speculation_options(with(flags, method), *s.model)),
        rule_(SamplingOptions{.temperature = flags.temperature}, options_.tokens, context),
        last_(target, rule_),
        text_(random_ids(context, s.config.model.vocab_size, 10)),
        context_(s.config.model.max_seq_len) {
    last_.assume(text_, plain.kept);
    const bool retrieves = method == "retrieval" || method == "triforce";
    const std::string draft = with(flags, method).draft;
    const bool by_sureness = options_.proposals == 0;
    if (method == "ngram") {
      add(std::make_unique<NgramLevel>(rule_), "ngram");
    } else if (method != "retrieval" && options_.draft == SpeculationOptions::Draft::SelfSkip) {
      add(std::make_unique<SelfSkipLevel>(last_, rule_, by_sureness, options_.window), "self-skip");
    } else if (method != "retrieval" && options_.draft == SpeculationOptions::Draft::Ngram) {
      throw UsageError("An n-gram has nothing to go by in a random text.",
                       "Take --draft PRESET or self-skip.");
    } else if (method != "retrieval") {
      draft_.emplace(flags, draft, s);
      add(std::make_unique<WindowLevel>(*draft_->cached, rule_, by_sureness, options_.window), draft);
    }
    if (retrieves)
      add(std::make_unique<RetrievalLevel>(last_, rule_, inner_.empty() && by_sureness, options_.retrieval),
          "retrieval");
    for (std::size_t i = 0; i < inner_.size(); ++i) {
      acceptance_.push_back(i == 0 ? 0 : given(flags, 2, method));
      force(*inner_[i], acceptance_.back());
    }
    acceptance_.push_back(given(flags, retrieves ? 0 : 1, method));
    force(last_, acceptance_.back());
    names_.emplace_back("target");
    std::vector<std::int64_t> proposals(inner_.size(), options_.proposals_between);
    proposals.back() = options_.proposals;
    if (options_.proposals > 0) {
      pace_ = std::make_unique<FixedPace>(proposals);
    } else {
      pace_ = std::make_unique<AdaptivePace>(
          AdaptivePace::Limits{.levels = static_cast<std::int64_t>(proposals.size()) + 1});
    }
    std::vector<Level*> levels;
    for (const auto& level : forced_) levels.push_back(level.get());
    chain_ = std::make_unique<Chain>(levels, chance_, *pace_);
  }

  SpeculationReport run(std::int64_t tokens) {
    // A pass op by op leaves the queries that a gathering goes by.
    std::vector<Row> rows;
    text_.push_back(text_.front());
    last_.rows(text_, 1, rows);
    text_.pop_back();
    const Stopwatch first;
    chain_->settle(text_);
    first_settling_ = first.seconds();
    for (std::int64_t i = 0; i < kWarmUp; ++i) cycle();
    const std::vector<LevelCounts> before = chain_->counts();
    const Stopwatch watch;
    while (chain_->counts().back().tokens - before.back().tokens < tokens) cycle();
    SpeculationReport report;
    report.seconds = watch.seconds();
    for (std::size_t i = 0; i < names_.size(); ++i) {
      report.levels.push_back({names_[i], less(chain_->counts()[i], before[i]), 0});
      if (i >= inner_.size()) continue;
      if (const auto* g = dynamic_cast<const GatheredLevel*>(inner_[i].get()))
        report.levels.back().gatherings = g->gatherings();
    }
    report.tokens = report.levels.back().counts.tokens;
    return report;
  }

  /// Seconds of the first settling: of the prompt, with a gathering.
  double first_settling() const { return first_settling_; }
  const SpeculationOptions& options() const { return options_; }

  /// Seconds a token by the formula of docs/speculation.md, from the passes' mean times. 0: the numbers of
  /// proposals are not fixed.
  double by_formula(const SpeculationReport& report) const {
    if (options_.proposals == 0) return 0;
    double cost = 0;  // of a token of the level before
    double settling = 0;
    for (std::size_t i = 0; i < report.levels.size(); ++i) {
      const LevelCounts& n = report.levels[i].counts;
      const double passes = static_cast<double>(std::max<std::int64_t>(1, n.passes));
      const double pass = (n.seconds - n.settle_seconds) / passes;
      settling += n.settle_seconds;
      const bool last = i + 1 == report.levels.size();
      if (last) settling /= passes;
      const auto gamma = static_cast<double>(i == 0 ? 0
                                             : last ? options_.proposals
                                                    : options_.proposals_between);
      const double a = acceptance_[i];
      const double tokens = a < 1 ? (1 - std::pow(a, gamma + 1)) / (1 - a) : gamma + 1;
      cost = (gamma * cost + pass + (last ? settling : 0)) / tokens;
    }
    return cost;
  }

 private:
  void add(std::unique_ptr<Level> level, const std::string& name) {
    inner_.push_back(std::move(level));
    names_.push_back(name);
  }
  void force(Level& level, double acceptance) {
    forced_.push_back(std::make_unique<ForcedLevel>(level, acceptance, options_vocab(), forced_.size() + 5));
  }
  std::int64_t options_vocab() const { return last_.cached().vocab; }
  void cycle() {
    const auto room = context_ - std::ssize(text_);
    if (room < 1) throw InternalError("[bench] the context ends before the tokens do");
    chain_->cycle(text_, std::min<std::int64_t>(kMostVerified, room));
  }
  static LevelCounts less(LevelCounts a, const LevelCounts& b) {
    a.passes -= b.passes, a.proposed -= b.proposed, a.tested -= b.tested, a.accepted -= b.accepted;
    a.tokens -= b.tokens, a.seconds -= b.seconds, a.settle_seconds -= b.settle_seconds;
    a.plain_passes -= b.plain_passes, a.plain_seconds -= b.plain_seconds;
    return a;
  }

  SpeculationOptions options_;
  RowRule rule_;
  TargetLevel last_;
  std::vector<std::int32_t> text_;
  std::int64_t context_;
  std::optional<RandomDraft> draft_;
  std::vector<std::unique_ptr<Level>> inner_, forced_;
  std::vector<std::string> names_;
  std::vector<double> acceptance_;  // by level, of what it is proposed
  SeededChance chance_{1};
  std::unique_ptr<Pace> pace_;
  std::unique_ptr<Chain> chain_;
  double first_settling_ = 0;
};

void run_context(const SpeculativeBenchFlags& flags, const Globals& globals, std::int64_t context) {
  DecodeFlags decode = flags.model;
  decode.context = context;
  const EngineBench s = prepare_decode(decode, globals, flags.tokens + (kWarmUp + 2) * kMostVerified);
  Plain plain;
  {
    Engine engine(*s.c, *s.model, s.options);
    const DecodeTimes times = time_decode(engine, s, decode);
    plain = {times.seconds, kept_share(times.during), times.is_whole};
  }
  Context& c = *s.c;
  c.allocator().release_cache();  // the engine's keys and values make room for others
  KvCacheOptions of_cache = s.options.cache;
  std::int64_t beside = 0;
  for (const std::string& method : flags.methods)
    beside = std::max(beside, tokens_beside(speculation_options(with(flags, method), *s.model)));
  of_cache.bytes += KvCache::entry_bytes(c, *s.model) * of_cache.block * (beside / of_cache.block + 2) *
                    (s.config.model.depth + 1);
  KvCache cache(c, *s.model, of_cache);
  cache.fill_random(c);
  const std::unique_ptr<WholeStep> whole =
      open_steps(c, *s.model, s.options.rule, cache, s.config.model.vocab_size);
  const std::unique_ptr<ShortPasses> passes = ShortPasses::open(c, *s.model, s.options.rule, cache);
  const CachedModel target{
      c,           *s.model, s.options.rule, cache, s.config.model.vocab_size, s.options.max_rows,
      whole.get(), nullptr,  passes.get()};
  for (const std::string& method : flags.methods) {
    Composition composition(flags, method, s, target, plain, context);
    const SpeculationReport report = composition.run(flags.tokens);
    const SpeculationOptions& o = composition.options();
    nlohmann::json line = line_of("speculative", decode, s);
    line["kind"] = "composed";
    line["method"] = method;
    line["draft"] = draft_name(o, with(flags, method));
    line["gamma"] = o.proposals > 0 ? nlohmann::json(o.proposals) : nlohmann::json("auto");
    line["gamma_between"] = o.proposals_between;
    line["retrieval_budget"] = o.retrieval.budget;
    line["retrieval_chunk"] = o.retrieval.chunk;
    line["temperature"] = flags.temperature;
    line["given_acceptance"] = flags.acceptance;
    line["routed_fraction"] =
        s.config.routing.routes_depth() ? nlohmann::json(plain.kept) : nlohmann::json(nullptr);
    line["plain_whole_steps"] = plain.is_whole;
    line["first_settling_ms"] = 1e3 * composition.first_settling();
    const double formula = composition.by_formula(report);
    line["speedup_by_formula"] = formula > 0 ? nlohmann::json(plain.seconds / formula) : nullptr;
    print_speculative(std::move(line), report, plain.seconds, globals);
  }
}

}  // namespace

void bench_composed(const SpeculativeBenchFlags& flags, const Globals& globals) {
  for (const std::int64_t context : flags.contexts) run_context(flags, globals, context);
}

}  // namespace fathom::app
