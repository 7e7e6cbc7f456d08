// fathom quantize MODEL -o OUT
#include <algorithm>
#include <cstdio>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "app/calibration.h"
#include "app/command.h"
#include "app/engine_flags.h"
#include "app/export_flags.h"
#include "app/quantization_report.h"
#include "app/quantizer.h"
#include "app/trained_model.h"
#include "infer/quant/outliers.h"
#include "infer/quant/rotate.h"
#include "kernels/error.h"
#include "kernels/hadamard.h"
#include "src/core/stopwatch.h"
#include "src/core/units.h"
#include "src/io/token_store.h"
#include "src/model/exchange.h"

namespace fathom::app {

namespace {

struct QuantizeFlags : ExportFlags {
  std::string method;
  std::string calibration;
  std::int64_t calibration_tokens = 0;  // 0: as many as there are, up to a default
  bool gptq = false, rtn = false;       // neither: by the method and the calibration
  GptqOptions gptq_options;
  bool has_damping = false;
  bool refits = false, no_refits = false;
  std::uint64_t seed = 1;
  bool has_seed = false;
  int weights = 0;  // 0: as the method has it
  std::int64_t group = 0;
  int activations = 16;
  int kv = 16;
  std::string key_means;  // "on", "off"; empty: on where there is a calibration

  bool rotates() const { return method != "rtn"; }
  int bits() const { return weights > 0 ? weights : method == "rotate-only" ? 16 : 4; }
  bool has_few_bits() const { return bits() < 16 || kv < 16; }
  /// Rows of few bits want them spread, and so do queries and keys where caches are of few bits. rotate-only
  /// has all, to be looked at.
  OnlineHadamards online() const {
    const bool only = method == "rotate-only", are_few = activations < 16 && rotates();
    return {
        .down = only || are_few, .heads = only || are_few, .queries_keys = only || (kv < 16 && rotates())};
  }
  bool is_calibrated() const { return !calibration.empty() && has_few_bits(); }
  bool means_keys() const { return is_calibrated() && kv < 16 && key_means != "off"; }
  Quantizer quantizer() const {
    const bool by_gptq = gptq || (!rtn && is_calibrated() && bits() < 16 && method != "rtn");
    return by_gptq ? Quantizer::Gptq : Quantizer::RoundToNearest;
  }
};

void check(const QuantizeFlags& flags) {
  const bool rotates_only = flags.method == "rotate-only";
  if (rotates_only ? flags.bits() < 16 : !flags.has_few_bits()) {
    throw UsageError(
        fmt::format("--method {} does not go with --weights {}.", flags.method, flags.bits()),
        "rotate-only leaves weights of 16 bits or more as they are; rtn and quarot make 4 or 8 of them, or "
        "leave them with --weights 16 where --kv is 4 or 8.");
  }
  if (flags.activations < 16 && flags.bits() == 16) {
    throw UsageError(
        fmt::format("--activations {} goes with weights of few bits, and --method {} leaves them numbers.",
                    flags.activations, flags.method),
        "Take --method quarot or rtn, with --weights 4 or 8.");
  }
  const std::string none = rotates_only ? "rotate-only has none" : "--weights 16 leaves none";
  if (flags.group > 0 && flags.bits() == 16)
    throw UsageError(fmt::format("--group is of weights of 4 or 8 bits, and {}.", none));
  if (flags.bits() == 16 && (flags.gptq || flags.rtn))
    throw UsageError(fmt::format("--gptq and --rtn make weights of 4 or 8 bits, and {}.", none));
  if (flags.gptq && flags.calibration.empty()) {
    throw UsageError("--gptq chooses codes by what the products read, and there is no --calibration.",
                     "Give a token store of the model's tokenizer, such as that of its training.");
  }
  if (!flags.is_calibrated()) {
    const std::pair<bool, const char*> needing[] = {{flags.calibration_tokens > 0, "--calibration-tokens"},
                                                    {flags.refits, "--refit-thresholds"},
                                                    {flags.no_refits, "--no-refit-thresholds"}};
    for (const auto& [given, name] : needing) {
      if (given)
        throw UsageError(fmt::format(
            "{} needs weights, or keys and values, of 4 or 8 bits and a --calibration STORE.", name));
    }
  }
  if (flags.key_means == "on" && !flags.means_keys()) {
    throw UsageError("--key-means on needs keys of 4 or 8 bits, and a calibration that shows their mean.",
                     "Give --kv 4 or 8, and --calibration STORE.");
  }
  if (flags.quantizer() != Quantizer::Gptq) {
    const std::pair<bool, const char*> of_gptq[] = {{flags.gptq_options.act_order, "--act-order"},
                                                    {flags.has_damping, "--damping"}};
    for (const auto& [given, name] : of_gptq) {
      if (given) {
        throw UsageError(fmt::format("{} is of GPTQ, and these weights become their nearest codes.", name),
                         "Give --calibration STORE, and with --method rtn also --gptq.");
      }
    }
  }
  if (flags.has_seed && !flags.rotates()) throw UsageError("--seed is of a rotation, and rtn has none.");
}

// What a transform of so many elements is made of.
std::string described(const HadamardTransform& t) {
  std::string text = fmt::format("{}", t.size());
  if (t.block() < t.size()) text += fmt::format(" in blocks of {}", t.block());
  if (t.factor() > 1) text += fmt::format(" ({} x {})", t.factor(), t.block() / t.factor());
  return text;
}

// The first tokens of a store, and how they are looked at.
struct StreamSample {
  std::vector<std::int32_t> tokens;
  std::int64_t seq = 0;

  StreamSample(const std::string& path, const LoadedModel& loaded) {
    if (path.empty()) return;
    constexpr std::int64_t kTokens = 8192, kLongest = 512;
    const TokenStore store = TokenStore::open(path);
    require_same_tokens(store, loaded);
    tokens.resize(static_cast<std::size_t>(std::min(kTokens, store.num_tokens())));
    seq = std::min({kLongest, loaded.config.model.max_seq_len, std::ssize(tokens)});
    tokens.resize(tokens.size() - tokens.size() % static_cast<std::size_t>(seq));  // whole sequences
    store.read(0, tokens);
  }
  std::vector<double> outliers(const TrainedModel& m) const {
    if (tokens.empty()) return {};
    return stream_outliers(*m.context, *m.loaded.model, serving_rule(m.loaded.config.routing), tokens, seq);
  }
};

// By block: "3.1 2.9 ...".
std::string listed(const std::vector<double>& values) {
  std::string text;
  for (const double v : values) text += fmt::format("{}{:.1f}", text.empty() ? "" : " ", v);
  return text;
}

// What a rotation did to the greatest elements, of weights and of the stream.
struct Outliers {
  double before = 0, after = 0;
  std::vector<double> stream_before, stream_after;
  std::size_t tokens = 0;
};

Outliers rotate(TrainedModel& model, const QuantizeFlags& flags) {
  Context& c = *model.context;
  LoadedModel& loaded = model.loaded;
  const StreamSample sample(flags.calibration, loaded);
  Outliers o;
  o.tokens = sample.tokens.size();
  o.before = greatest_outlier(c, *loaded.model);
  o.stream_before = sample.outliers(model);
  loaded.model = rotate_model(c, *loaded.model, {.seed = flags.seed, .online = flags.online()});
  loaded.config.model = loaded.model->config();
  o.after = greatest_outlier(c, *loaded.model);
  o.stream_after = sample.outliers(model);
  return o;
}

Quantization quantization_of(const QuantizeFlags& flags) {
  Quantization q{.method = flags.method, .bits = flags.bits(), .group = flags.group};
  q.kv = flags.kv;
  q.key_means = flags.means_keys();
  if (!q.has_packed_weights()) q.kinds.clear();
  if (!flags.rotates() && flags.quantizer() == Quantizer::Gptq) q.method = "gptq";
  if (flags.rotates()) q.rotation_seed = flags.seed;
  q.activations = flags.activations;
  q.activation_clip = default_activation_clip(flags.activations);
  q.online = flags.online();
  return q;
}

// On what the store shows. The model becomes the quantized one.
QuantizationReport calibrate(TrainedModel& model, const QuantizeFlags& flags, CalibrationTokens calibration) {
  const Transformer& before = *model.loaded.model;
  const RoutingConfig& routing = model.loaded.config.routing;
  QuantizationReport r;
  r.quantization = quantization_of(flags);
  r.wanted = flags.quantizer();
  r.gptq = flags.gptq_options;
  r.calibration = std::move(calibration);
  const SelectionRule rule = serving_rule(routing);
  r.wants_refit = !flags.no_refits;
  r.refit = what_to_refit(routing, rule);
  const std::size_t tokens = r.calibration.tokens.size();
  const CalibrationOptions options{.rule = rule,
                                   .seq = r.calibration.seq,
                                   .by = r.wanted,
                                   .gptq = r.gptq,
                                   .refit_thresholds = r.wants_refit,
                                   .progress = [tokens](std::int64_t done, std::int64_t blocks) {
                                     fmt::print(stderr, "quantizing block {} of {} on {} tokens\n", done + 1,
                                                blocks, tokens);
                                   }};
  r.made = quantize_calibrated(*model.context, before, r.quantization, r.calibration.tokens, options);
  const SelectionRule now = r.made.rule ? SelectionRule(*r.made.rule) : rule;
  r.compared = compare_models(*model.context, before, *r.made.quantized.model, {rule, now},
                              r.calibration.held_out, r.calibration.seq);
  if (r.made.rule) model.loaded.config.routing.causal.threshold = r.made.rule->threshold;
  model.loaded.model = std::move(r.made.quantized.model);
  return r;
}

// Returns the relative errors by kind of product.
std::map<std::string, double> round_weights(TrainedModel& model, const QuantizeFlags& flags) {
  QuantizedModel made = quantize_model(*model.context, *model.loaded.model, quantization_of(flags), quantize);
  model.loaded.model = std::move(made.model);
  return made.relative_error;
}

struct Report {
  double bytes_before = 0;
  std::optional<Outliers> outliers;  // of a rotation
  std::optional<QuantizationReport> calibrated;
  std::map<std::string, double> relative_error;
  Exported exported;
};

void print_json(const QuantizeFlags& flags, const Report& r, const ModelConfig& m) {
  nlohmann::json json = {{"path", flags.output},
                         {"files", r.exported.files},
                         {"model_type", r.exported.model_type},
                         {"method", flags.method},
                         {"weights", flags.bits()},
                         {"group", flags.group},
                         {"activations", flags.activations},
                         {"kv", flags.kv},
                         {"key_means", flags.means_keys()},
                         {"quantizer", flags.bits() == 16                     ? "none"
                                       : flags.quantizer() == Quantizer::Gptq ? "gptq"
                                                                              : "rtn"},
                         {"precision", flags.precision},
                         {"bytes", r.exported.bytes},
                         {"bytes_before", r.bytes_before},
                         {"relative_error", r.relative_error}};
  if (r.outliers) {
    json["seed"] = flags.seed;
    json["stream_block"] = HadamardTransform(m.width).block();
    json["head_block"] = HadamardTransform(m.head_dim()).block();
    if (flags.online().down) json["hidden_block"] = HadamardTransform(m.ffn_hidden).block();
    if (flags.online().heads) json["heads_block"] = HadamardTransform(m.heads).block();
    json["outlier_before"] = r.outliers->before;
    json["outlier_after"] = r.outliers->after;
    json["calibration_tokens"] = r.outliers->tokens;  // its first name, of when nothing else was calibrated
    json["stream_tokens"] = r.outliers->tokens;
    json["stream_outliers_before"] = r.outliers->stream_before;
    json["stream_outliers_after"] = r.outliers->stream_after;
  }
  if (r.calibrated) json["report"] = r.calibrated->json(r.exported.bytes);
  std::cout << json.dump() << "\n";
}

// What is transformed as the model runs.
std::string online_text(const OnlineHadamards& online, const ModelConfig& m) {
  std::vector<std::string> of;
  if (online.down)
    of.push_back(fmt::format("{} (the MLP's hidden width)", described(HadamardTransform(m.ffn_hidden))));
  if (online.heads) of.push_back(fmt::format("{} (heads)", described(HadamardTransform(m.heads))));
  if (online.queries_keys)
    of.push_back(fmt::format("{} (queries and keys)", described(HadamardTransform(m.head_dim()))));
  return of.empty() ? "" : fmt::format(", and as it runs of {}", fmt::join(of, ", "));
}

void print_text(const QuantizeFlags& flags, const Report& r, const ModelConfig& m) {
  const bool are_few = flags.bits() < 16;
  std::cout << fmt::format("{}: {} of weights, {} before", flags.output, format_bytes(r.exported.bytes),
                           format_bytes(r.bytes_before))
            << (are_few ? fmt::format("; products in {} bits{}{}, all else in {}", flags.bits(),
                                      flags.group > 0 ? fmt::format(", groups of {}", flags.group) : "",
                                      flags.activations < 16
                                          ? fmt::format(", by rows of {} bits", flags.activations)
                                          : "",
                                      flags.precision)
                        : fmt::format("; in {}", flags.precision))
            << (flags.kv < 16 ? fmt::format("; keys and values in {} bits{}", flags.kv,
                                            flags.means_keys() ? ", keys without their mean" : "")
                              : "")
            << (r.outliers
                    ? fmt::format("; rotated by Hadamard transforms of {} (the stream) and {} (the heads' "
                                  "values)",
                                  described(HadamardTransform(m.width)),
                                  described(HadamardTransform(m.head_dim())))
                    : "")
            << online_text(flags.online(), m) << ".\n";
  if (are_few) {
    std::cout << "What is lost of the weights, root of the squares' sum over theirs:";
    for (const auto& [kind, error] : r.relative_error)
      std::cout << fmt::format(" {} {:.2f} %", kind, 100 * error);
    std::cout << ".\n";
  }
  if (r.calibrated) std::cout << r.calibrated->table();
  if (!r.outliers) return;
  std::cout << fmt::format(
      "The greatest weight of a matrix, over the matrix's root mean square: {:.1f} before, {:.1f} now.\n",
      r.outliers->before, r.outliers->after);
  if (r.outliers->tokens == 0) return;
  std::cout << fmt::format(
      "The greatest element of the stream over its root mean square, the mean of {} tokens, behind 0, 1, ... "
      "blocks:\n"
      "  before  {}\n  now     {}\n",
      r.outliers->tokens, listed(r.outliers->stream_before), listed(r.outliers->stream_after));
}

// Matrices of some hundred megabytes come and go all the time. Their memory would each time go back to the
// system, and come from it anew, page by page.
void keep_freed_memory() {
#ifdef __GLIBC__
  ::mallopt(M_MMAP_MAX, 0);
  ::mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max());
#endif
}

void run(const QuantizeFlags& flags, const Globals& globals) {
  check(flags);
  keep_freed_memory();
  require_another_folder(flags.output, flags.model);
  require_room_for_export(flags.output);
  // The same command gives the same bytes.
  TrainedModel model = open_model(flags.model, {.deterministic = true}, globals);
  require_unquantized(model.loaded, "quantize");
  Report report;
  report.bytes_before = static_cast<double>(model.loaded.model->parameters().count()) *
                        static_cast<double>(size_of(flags.options().dtype));
  // Before anything that takes long.
  require_exportable(model.loaded, flags.output, flags.options());
  if (flags.bits() < 16) {
    const Quantization quantization = quantization_of(flags);
    for (const ParameterSpec& spec : model.loaded.model->parameters().specs()) {
      if (quantization.holds(spec)) quantization.format(spec);  // the group divides its rows
    }
  }
  // A rotated model decides as its own does.
  CalibrationTokens calibration;
  if (flags.is_calibrated())
    calibration = read_calibration(flags.calibration, model, flags.calibration_tokens);
  Stopwatch watch;
  if (flags.rotates()) report.outliers = rotate(model, flags);
  spdlog::debug("the rotation took {:.2f} s", watch.seconds());
  ExportOptions options = flags.options();
  if (flags.is_calibrated()) {
    report.calibrated = calibrate(model, flags, std::move(calibration));
    report.calibrated->bytes_before = report.bytes_before;
    report.relative_error = report.calibrated->made.quantized.relative_error;
    options.report = [&](double bytes) { return report.calibrated->json(bytes).dump(1) + "\n"; };
  } else if (flags.has_few_bits()) {
    report.relative_error = round_weights(model, flags);
  }
  watch.restart();
  report.exported = export_model(model.loaded, model.context->backend(), flags.output, options);
  spdlog::debug("writing took {:.2f} s", watch.seconds());
  const ModelConfig& m = model.loaded.config.model;
  globals.json ? print_json(flags, report, m) : print_text(flags, report, m);
}

}  // namespace

void add_quantize(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<QuantizeFlags>();
  CLI::App* sub = app.add_subcommand(
      "quantize", "Make a model's weights, keys and values 4 or 8 bits, or rotate it for that");
  add_export_flags(*sub, *flags);
  sub->add_option("--method", flags->method,
                  "rtn: rounds to the nearest, or by --gptq, without a rotation | quarot: rotates first | "
                  "rotate-only: spreads outliers over "
                  "all channels by "
                  "rotations that change nothing of what the model computes but its rounding")
      ->required()
      ->check(CLI::IsMember({"rtn", "quarot", "rotate-only"}));
  sub->add_option("--weights", flags->weights,
                  "4 | 8 | 16: bits of the weights of products; default: 4, of rotate-only 16")
      ->check(CLI::IsMember({4, 8, 16}));
  sub->add_option("--activations", flags->activations,
                  "4 | 8 | 16: bits of the rows that these products read, a scale a row; 16: numbers")
      ->capture_default_str()
      ->check(CLI::IsMember({4, 8, 16}));
  add_kv_flag(*sub, flags->kv,
              "4 | 8 | 16: bits of the keys and values that the model's caches hold; default: 16, as they "
              "are computed");
  sub->add_option("--key-means", flags->key_means,
                  "on | off: whether keys of few bits come without the mean that the calibration shows, "
                  "which attention does not notice and their codes do; default: on with --kv 4 or 8 and "
                  "--calibration")
      ->check(CLI::IsMember({"on", "off"}));
  sub->add_option("--group", flags->group, "Columns that share a scale, such as 128; 0: one scale a row")
      ->capture_default_str()
      ->check(number_from_to(0, 1e9));
  sub->add_option(
         "--calibration", flags->calibration,
         "Token store: what the products read of it chooses the codes (GPTQ), its end shows what that "
         "costs, and its first 8192 tokens how far elements of the stream stand out")
      ->check([](const std::string& path) { return path.empty() ? std::string("is empty") : std::string(); });
  sub->add_option("--calibration-tokens", flags->calibration_tokens,
                  "Tokens to calibrate on; default: 128 sequences of 2048, or what there is")
      ->check(number_from_to(1, 1e12));
  CLI::Option* gptq = sub->add_flag(
      "--gptq", flags->gptq, "Columns make up for what others lost (default with quarot and --calibration)");
  sub->add_flag("--rtn", flags->rtn, "Each weight to its nearest code (default otherwise)")->excludes(gptq);
  sub->add_flag("--act-order", flags->gptq_options.act_order, "GPTQ: columns that are read most come first");
  sub->add_option("--damping", flags->gptq_options.damping,
                  "GPTQ: added to the Hessian's diagonal, as a share of its mean")
      ->capture_default_str()
      ->check(number_from_to(0, 1e6));
  CLI::Option* refits = sub->add_flag("--refit-thresholds", flags->refits,
                                      "Shift predictors' biases so that each layer keeps the share of "
                                      "tokens that it kept (default with --calibration)");
  sub->add_flag("--no-refit-thresholds", flags->no_refits, "Leave them")->excludes(refits);
  sub->add_option("--seed", flags->seed, "Of the rotation's signs")->capture_default_str();
  add_global_flags(*sub, globals);
  sub->footer(
      "What comes out is a model folder: eval, generate and routes take it.\n"
      "Examples:\n"
      "  fathom quantize runs/mod -o model --method quarot --calibration data/train.h5\n"
      "  fathom quantize runs/mod -o model --method quarot --activations 8 --calibration data/train.h5\n"
      "  fathom quantize runs/mod -o model --method quarot --group 64\n"
      "  fathom quantize runs/mod -o model --method rtn --weights 8 --kv 8\n"
      "  fathom quantize runs/mod -o model --method rtn --weights 16 --kv 4\n"
      "  fathom quantize runs/mod -o model --method rotate-only");
  sub->callback([flags, sub, &globals] {
    flags->has_damping = sub->count("--damping") > 0;
    flags->has_seed = sub->count("--seed") > 0;
    run(*flags, globals);
  });
}

}  // namespace fathom::app
