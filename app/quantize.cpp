// fathom quantize MODEL -o OUT
#include <iostream>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "app/command.h"
#include "app/export_flags.h"
#include "app/trained_model.h"
#include "infer/quant/hadamard.h"
#include "infer/quant/rotate.h"
#include "kernels/error.h"
#include "src/core/units.h"
#include "src/model/exchange.h"

namespace fathom::app {

namespace {

struct QuantizeFlags : ExportFlags {
  std::string method;
  std::uint64_t seed = 1;
};

// What a transform of so many elements is made of.
std::string described(const HadamardTransform& t) {
  std::string text = fmt::format("{}", t.size());
  if (t.block() < t.size()) text += fmt::format(" in blocks of {}", t.block());
  if (t.factor() > 1) text += fmt::format(" ({} x {})", t.factor(), t.block() / t.factor());
  return text;
}

void run(const QuantizeFlags& flags, const Globals& globals) {
  TrainedModel model = open_model(flags.model, false, globals);
  Context& c = *model.context;
  LoadedModel& loaded = model.loaded;
  const double before = greatest_outlier(c, *loaded.model);
  loaded.model = rotate_model(c, *loaded.model, {.seed = flags.seed});
  loaded.config.model = loaded.model->config();
  const double after = greatest_outlier(c, *loaded.model);
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
                                {"outlier_after", after}}
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
         "model computes")
      ->required()
      ->check(CLI::IsMember({"rotate-only"}));
  sub->add_option("--seed", flags->seed, "Of the rotation's signs")->capture_default_str();
  add_global_flags(*sub, globals);
  sub->footer(
      "The model that comes out is loaded by all that loads the one that went in.\n"
      "Example:\n"
      "  fathom quantize runs/mod -o model --method rotate-only");
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
