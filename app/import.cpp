// fathom import FOLDER -o MODEL
#include <iostream>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "app/command.h"
#include "app/export_flags.h"
#include "app/trained_model.h"
#include "kernels/error.h"
#include "src/config/names.h"
#include "src/core/units.h"
#include "src/model/exchange.h"
#include "src/model/model_tokenizer.h"

namespace fathom::app {

namespace {

struct ImportFlags {
  std::string folder;
  std::string output;
  std::string precision = "keep";
};

DType dtype_of(const ImportFlags& flags) {
  if (flags.precision == "keep") return exchange_dtype(flags.folder);
  return flags.precision == "bf16" ? DType::BF16 : DType::F32;
}

// Null, with a warning, where Fathom does not read it.
std::unique_ptr<Tokenizer> open_tokenizer(const LoadedModel& model) {
  try {
    return tokenizer_of(model);
  } catch (const UserError& e) {
    spdlog::warn("Warning: the model takes ids only, no text: {}", e.what());
    return nullptr;
  }
}

std::string describe_tokenizer(const Tokenizer* tokenizer) {
  if (tokenizer == nullptr) return "not read by Fathom";
  std::string text = fmt::format("{}, {} tokens", tokenizer->kind(), with_commas(tokenizer->vocab_size()));
  if (tokenizer->bos() >= 0) text += fmt::format(", texts begin with {}", tokenizer->bos());
  if (tokenizer->end_of_document() >= 0)
    text += fmt::format(", documents end with {}", tokenizer->end_of_document());
  return text;
}

void print_text(const ImportFlags& flags, const LoadedModel& model, const Exported& exported,
                const Tokenizer* tokenizer, const char* precision) {
  const ModelConfig& m = model.config.model;
  const auto line = [](const char* name, const std::string& value) {
    fmt::print("  {:<11} {}\n", name, value);
  };
  fmt::print("{}: {} of {} parameters, from {}\n", flags.output, exported.model_type,
             format_count(static_cast<double>(model.model->parameters().count())), flags.folder);
  line("blocks", fmt::format("{} of width {}, MLP {}, {} heads of {} ({} of keys and values)", m.depth,
                             m.width, m.ffn_hidden, m.heads, m.head_dim(), m.kv_heads));
  line("vocabulary", fmt::format("{}, embedding and head {}", with_commas(m.vocab_size),
                                 m.tie_embeddings ? "tied" : "apart"));
  std::string context = fmt::format("{} tokens, rotary base {:g}", with_commas(m.max_seq_len), m.rope_theta);
  if (m.rope_scaling.kind != RopeScalingKind::None) {
    context += fmt::format(", scaled {:g} times ({})", m.rope_scaling.factor, name_of(m.rope_scaling.kind));
  }
  line("context", context);
  line("tokenizer", describe_tokenizer(tokenizer));
  line("weights", fmt::format("{}, {}", format_bytes(exported.bytes), precision));
  line("files", fmt::format("{}", fmt::join(exported.files, ", ")));
}

void print_json(const ImportFlags& flags, const LoadedModel& model, const Exported& exported,
                const Tokenizer* tokenizer, const char* precision) {
  const ModelConfig& m = model.config.model;
  nlohmann::json json = {{"path", flags.output},
                         {"files", exported.files},
                         {"model_type", exported.model_type},
                         {"parameters", model.model->parameters().count()},
                         {"precision", precision},
                         {"bytes", exported.bytes},
                         {"vocab_size", m.vocab_size},
                         {"context", m.max_seq_len},
                         {"rope_theta", m.rope_theta},
                         {"rope_scaling", name_of(m.rope_scaling.kind)},
                         {"tied", m.tie_embeddings},
                         {"tokenizer", nullptr}};
  if (tokenizer != nullptr) {
    json["tokenizer"] = {{"kind", tokenizer->kind()},
                         {"vocab_size", tokenizer->vocab_size()},
                         {"hash", tokenizer->hash()},
                         {"bos", tokenizer->bos()},
                         {"end_of_document", tokenizer->end_of_document()}};
  }
  std::cout << json.dump() << "\n";
}

void run(const ImportFlags& flags, const Globals& globals) {
  if (!is_exported_model(flags.folder)) {
    throw UserError(fmt::format("{} is no folder with a model's config.json.", flags.folder),
                    "Give a folder as Hugging Face transformers lays it out; fathom export takes runs.");
  }
  require_another_folder(flags.output, flags.folder);
  const DType dtype = dtype_of(flags);
  const TrainedModel model = open_model(flags.folder, {}, globals);
  require_unquantized(model.loaded, "import");
  const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(model.loaded);
  ExportOptions options;
  options.dtype = dtype;
  const Exported exported = export_model(model.loaded, model.context->backend(), flags.output, options);
  const char* precision = dtype == DType::BF16 ? "bf16" : "fp32";
  if (globals.json) {
    print_json(flags, model.loaded, exported, tokenizer.get(), precision);
  } else {
    print_text(flags, model.loaded, exported, tokenizer.get(), precision);
  }
}

}  // namespace

void add_import(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<ImportFlags>();
  CLI::App* sub = app.add_subcommand(
      "import", "Check a Llama or Qwen3 of another program and make it a model of Fathom's");
  sub->add_option("folder", flags->folder, "Folder with config.json, safetensors and the tokenizer's files")
      ->required();
  sub->add_option("-o,--output", flags->output, "The folder to write")->required();
  sub->add_option("--precision", flags->precision,
                  "keep | fp32 | bf16: of the weights; keep: bf16 if they are that, else fp32")
      ->capture_default_str()
      ->check(CLI::IsMember({"keep", "fp32", "bf16"}));
  add_global_flags(*sub, globals);
  sub->footer(
      "eval and generate take such a folder as it is; an imported one is checked, in one file, and whole or "
      "not there.\n"
      "Examples:\n"
      "  fathom import Llama-3.2-1B -o llama\n"
      "  fathom import Qwen3-model -o qwen --precision bf16 --json");
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
