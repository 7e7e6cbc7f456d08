// fathom quantize MODEL -o OUT
#include <algorithm>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "app/command.h"
#include "app/export_flags.h"
#include "app/quantizer.h"
#include "app/trained_model.h"
#include "infer/quant/hadamard.h"
#include "infer/quant/outliers.h"
#include "infer/quant/rotate.h"
#include "kernels/error.h"
#include "src/core/units.h"
#include "src/io/token_store.h"
#include "src/model/exchange.h"

namespace fathom::app {

namespace {

struct QuantizeFlags : ExportFlags {
  std::string method;
  std::string calibration;
  std::uint64_t seed = 1;
  int weights = 0;  // 0: as the method has it
  std::int64_t group = 0;

  bool rotates() const { return method != "rtn"; }
  int bits() const { return weights > 0 ? weights : method == "rotate-only" ? 16 : 4; }
};

void check(const QuantizeFlags& flags) {
  if ((flags.method == "rotate-only") != (flags.bits() == 16)) {
    throw UsageError(
        fmt::format("--method {} does not go with --weights {}.", flags.method, flags.bits()),
        "rotate-only leaves weights of 16 bits or more as they are; rtn and quarot make 4 or 8 of them.");
  }
  if (flags.group > 0 && flags.bits() == 16)
    throw UsageError("--group is of weights of 4 or 8 bits, and rotate-only has none.");
  if (!flags.calibration.empty() && !flags.rotates())
    throw UsageError("--calibration shows what a rotation does to the stream, and rtn has none.");
}

// What a transform of so many elements is made of.
std::string described(const HadamardTransform& t) {
  std::string text = fmt::format("{}", t.size());
  if (t.block() < t.size()) text += fmt::format(" in blocks of {}", t.block());
  if (t.factor() > 1) text += fmt::format(" ({} x {})", t.factor(), t.block() / t.factor());
  return text;
}

// The first tokens of a store, and how they are looked at.
struct Calibration {
  std::vector<std::int32_t> tokens;
  std::int64_t seq = 0;

  Calibration(const std::string& path, const LoadedModel& loaded) {
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
    const RoutingConfig& routing = m.loaded.config.routing;
    SelectionRule rule = TopK{};
    if (routing.kind != RoutingKind::None && !routing.needs_future()) rule = causal_rule(routing);
    return stream_outliers(*m.context, *m.loaded.model, rule, tokens, seq);
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
  const Calibration calibration(flags.calibration, loaded);
  Outliers o;
  o.tokens = calibration.tokens.size();
  o.before = greatest_outlier(c, *loaded.model);
  o.stream_before = calibration.outliers(model);
  loaded.model = rotate_model(c, *loaded.model, {.seed = flags.seed});
  loaded.config.model = loaded.model->config();
  o.after = greatest_outlier(c, *loaded.model);
  o.stream_after = calibration.outliers(model);
  return o;
}

// Returns the relative errors by kind of product.
std::map<std::string, double> make_few_bits(TrainedModel& model, const QuantizeFlags& flags) {
  Quantization q{.method = flags.method, .bits = flags.bits(), .group = flags.group};
  if (flags.rotates()) q.rotation_seed = flags.seed;
  QuantizedModel made = quantize_model(*model.context, *model.loaded.model, q, quantize);
  model.loaded.model = std::move(made.model);
  return made.relative_error;
}

struct Report {
  double bytes_before = 0;
  std::optional<Outliers> outliers;  // of a rotation
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
                         {"precision", flags.precision},
                         {"bytes", r.exported.bytes},
                         {"bytes_before", r.bytes_before},
                         {"relative_error", r.relative_error}};
  if (r.outliers) {
    json["seed"] = flags.seed;
    json["stream_block"] = HadamardTransform(m.width).block();
    json["head_block"] = HadamardTransform(m.head_dim()).block();
    json["outlier_before"] = r.outliers->before;
    json["outlier_after"] = r.outliers->after;
    json["calibration_tokens"] = r.outliers->tokens;
    json["stream_outliers_before"] = r.outliers->stream_before;
    json["stream_outliers_after"] = r.outliers->stream_after;
  }
  std::cout << json.dump() << "\n";
}

void print_text(const QuantizeFlags& flags, const Report& r, const ModelConfig& m) {
  const bool are_few = flags.bits() < 16;
  std::cout << fmt::format("{}: {} of weights, {} before", flags.output, format_bytes(r.exported.bytes),
                           format_bytes(r.bytes_before))
            << (are_few ? fmt::format("; products in {} bits{}, all else in {}", flags.bits(),
                                      flags.group > 0 ? fmt::format(", groups of {}", flags.group) : "",
                                      flags.precision)
                        : fmt::format("; in {}", flags.precision))
            << (r.outliers
                    ? fmt::format(", rotated by Hadamard transforms of {} (the stream) and {} (the heads' "
                                  "values)",
                                  described(HadamardTransform(m.width)),
                                  described(HadamardTransform(m.head_dim())))
                    : "")
            << ".\n";
  if (are_few) {
    std::cout << "What is lost of the weights, root of the squares' sum over theirs:";
    for (const auto& [kind, error] : r.relative_error)
      std::cout << fmt::format(" {} {:.2f} %", kind, 100 * error);
    std::cout << ".\n";
  }
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

void run(const QuantizeFlags& flags, const Globals& globals) {
  check(flags);
  TrainedModel model = open_model(flags.model, false, globals);
  require_unquantized(model.loaded, "quantize");
  Report report;
  report.bytes_before = static_cast<double>(model.loaded.model->parameters().count()) *
                        static_cast<double>(size_of(flags.options().dtype));
  if (flags.rotates()) report.outliers = rotate(model, flags);
  if (flags.bits() < 16) report.relative_error = make_few_bits(model, flags);
  report.exported = export_model(model.loaded, model.context->backend(), flags.output, flags.options());
  const ModelConfig& m = model.loaded.config.model;
  globals.json ? print_json(flags, report, m) : print_text(flags, report, m);
}

}  // namespace

void add_quantize(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<QuantizeFlags>();
  CLI::App* sub = app.add_subcommand("quantize", "Make a model's weights 4 or 8 bits, or rotate it for that");
  add_export_flags(*sub, *flags);
  sub->add_option("--method", flags->method,
                  "rtn: rounds to the nearest | quarot: rotates first | rotate-only: spreads outliers over "
                  "all channels by "
                  "rotations that change nothing of what the model computes but its rounding")
      ->required()
      ->check(CLI::IsMember({"rtn", "quarot", "rotate-only"}));
  sub->add_option("--weights", flags->weights,
                  "4 | 8 | 16: bits of the weights of products; default: 4, of rotate-only 16")
      ->check(CLI::IsMember({4, 8, 16}));
  sub->add_option("--group", flags->group, "Columns that share a scale, such as 128; 0: one scale a row")
      ->capture_default_str()
      ->check(number_from_to(0, 1e9));
  sub->add_option(
      "--calibration", flags->calibration,
      "Token store: its first 8192 tokens show how far elements of the stream stand out, before and "
      "now");
  sub->add_option("--seed", flags->seed, "Of the rotation's signs")->capture_default_str();
  add_global_flags(*sub, globals);
  sub->footer(
      "What comes out is a model folder: eval, generate and routes take it.\n"
      "Examples:\n"
      "  fathom quantize runs/mod -o model --method quarot --group 64\n"
      "  fathom quantize runs/mod -o model --method rtn --weights 8\n"
      "  fathom quantize runs/mod -o model --method rotate-only");
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
