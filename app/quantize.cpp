// fathom quantize MODEL -o OUT
#include <algorithm>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "app/command.h"
#include "app/export_flags.h"
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
};

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

void run(const QuantizeFlags& flags, const Globals& globals) {
  TrainedModel model = open_model(flags.model, false, globals);
  Context& c = *model.context;
  LoadedModel& loaded = model.loaded;
  const Calibration calibration(flags.calibration, loaded);
  const double before = greatest_outlier(c, *loaded.model);
  const std::vector<double> stream_before = calibration.outliers(model);
  loaded.model = rotate_model(c, *loaded.model, {.seed = flags.seed});
  loaded.config.model = loaded.model->config();
  const double after = greatest_outlier(c, *loaded.model);
  const std::vector<double> stream_after = calibration.outliers(model);
  const Exported exported = export_model(loaded, c.backend(), flags.output, flags.options());
  const ModelConfig& m = loaded.config.model;
  const HadamardTransform stream(m.width), heads(m.head_dim());
  if (globals.json) {
    std::cout << nlohmann::json{{"path", flags.output},
                                {"files", exported.files},
                                {"model_type", exported.model_type},
                                {"method", flags.method},
                                {"seed", flags.seed},
                                {"precision", flags.precision},
                                {"bytes", exported.bytes},
                                {"stream_block", stream.block()},
                                {"head_block", heads.block()},
                                {"outlier_before", before},
                                {"outlier_after", after},
                                {"calibration_tokens", calibration.tokens.size()},
                                {"stream_outliers_before", stream_before},
                                {"stream_outliers_after", stream_after}}
                     .dump()
              << "\n";
    return;
  }
  std::cout << fmt::format(
      "{}: {} of weights in {}, rotated by Hadamard transforms of {} (the stream) and {} (the heads' "
      "values).\n"
      "The greatest weight of a matrix, over the matrix's root mean square: {:.1f} before, {:.1f} now.\n",
      flags.output, format_bytes(exported.bytes), flags.precision, described(stream), described(heads),
      before, after);
  if (calibration.tokens.empty()) return;
  std::cout << fmt::format(
      "The greatest element of the stream over its root mean square, the mean of {} tokens, behind 0, 1, ... "
      "blocks:\n"
      "  before  {}\n  now     {}\n",
      calibration.tokens.size(), listed(stream_before), listed(stream_after));
}

}  // namespace

void add_quantize(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<QuantizeFlags>();
  CLI::App* sub =
      app.add_subcommand("quantize", "Prepare a model for weights of few bits: so far its rotation");
  add_export_flags(*sub, *flags);
  sub->add_option(
         "--method", flags->method,
         "rotate-only: spreads outliers over all channels by rotations that change nothing of what the "
         "model computes but its rounding")
      ->required()
      ->check(CLI::IsMember({"rotate-only"}));
  sub->add_option(
      "--calibration", flags->calibration,
      "Token store: its first 8192 tokens show how far elements of the stream stand out, before and "
      "now");
  sub->add_option("--seed", flags->seed, "Of the rotation's signs")->capture_default_str();
  add_global_flags(*sub, globals);
  sub->footer(
      "What comes out is an exported model: eval, generate and routes take it.\n"
      "Example:\n"
      "  fathom quantize runs/mod -o model --method rotate-only");
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
