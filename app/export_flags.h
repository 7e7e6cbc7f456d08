// What commands have in common that write a model as `export` does.
#pragma once

#include <string>

#include <CLI/CLI.hpp>

#include "src/model/exchange.h"

namespace fathom::app {

struct ExportFlags {
  std::string model;
  std::string output;
  std::string precision = "fp32";
  std::string tokenizer;

  ExportOptions options() const;
};

/// UsageError: the folder that is to be written is the model's own.
void require_another_folder(const std::string& output, const std::string& model);

/// Declares the model, --output, --precision and --tokenizer.
void add_export_flags(CLI::App& sub, ExportFlags& flags);

}  // namespace fathom::app
