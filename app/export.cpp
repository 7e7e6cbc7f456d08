// fathom export RUN -o MODEL
#include <iostream>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "app/command.h"
#include "app/export_flags.h"
#include "app/trained_model.h"
#include "kernels/error.h"
#include "src/core/units.h"
#include "src/model/exchange.h"

namespace fathom::app {

namespace {

// Why no other engine computes it, and what each would have to add.
std::string what_others_lack(const RoutingConfig& routing) {
  std::vector<std::string> lacks;
  if (routing.routes_depth())
    lacks.emplace_back("blocks that compute some of the tokens, with a cache of their own length each");
  if (routing.experts_choose()) lacks.emplace_back("experts that choose their tokens");
  if (routing.tokens_choose()) lacks.emplace_back("experts with this router's limits");
  return fmt::format("{}", fmt::join(lacks, ", and "));
}

void run(const ExportFlags& flags, const Globals& globals) {
  require_another_folder(flags.output, flags.model);
  const TrainedModel model = open_model(flags.model, {}, globals);
  require_unquantized(model.loaded, "export");
  const Exported exported =
      export_model(model.loaded, model.context->backend(), flags.output, flags.options());
  const bool is_routed = model.loaded.config.routing.kind != RoutingKind::None;
  if (globals.json) {
    std::cout << nlohmann::json{{"path", flags.output},
                                {"files", exported.files},
                                {"model_type", exported.model_type},
                                {"precision", flags.precision},
                                {"bytes", exported.bytes},
                                {"loads_elsewhere", !is_routed}}
                     .dump()
              << "\n";
    return;
  }
  std::cout << fmt::format("{}: {} of weights in {}, as {}; {}\n", flags.output, format_bytes(exported.bytes),
                           flags.precision, exported.model_type, fmt::join(exported.files, ", "));
  if (is_routed) {
    std::cout << fmt::format(
        "Only Fathom runs it: transformers, vLLM and llama.cpp have no {} (docs/formats.md says what is in "
        "the files).\n",
        what_others_lack(model.loaded.config.routing));
  }
}

}  // namespace

void add_export(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<ExportFlags>();
  CLI::App* sub =
      app.add_subcommand("export", "Write a model as safetensors, config.json and tokenizer files");
  add_export_flags(*sub, *flags);
  add_global_flags(*sub, globals);
  sub->footer(
      "A dense model is one that transformers loads, as a Llama or, with QK-norm, a Qwen3.\n"
      "Examples:\n"
      "  fathom export runs/dense -o model\n"
      "  fathom export runs/mod -o model --precision bf16");
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
