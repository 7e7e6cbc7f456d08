// Models in exchange with other programs: a folder with config.json, safetensors and the tokenizer's files,
// as Hugging Face transformers lays it out (docs/formats.md).
//
// A dense model is a Llama there, or a Qwen3 where it has QK-norm. A routed one has the same names for the
// same things, its routers and experts beside them, and the model type "fathom", which no other engine knows.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "src/model/checkpoint.h"

namespace fathom {

struct ExportOptions {
  DType dtype = DType::F32;  // of the weights: F32 (as they were trained), or BF16 (rounded to nearest even)
  std::string tokenizer;     // a SentencePiece model; empty: tokenizer_of()'s
  /// What quantization_report.json says, beside weights of so many bytes; empty: there is none.
  std::function<std::string(double bytes)> report = {};
};

struct Exported {
  std::vector<std::string> files;  // names in the folder
  std::string model_type;          // "llama", "qwen3" or "fathom"
  double bytes = 0;                // of the weights
};

/// Writes `folder`, whole or not at all; an export that is there is replaced. UserError: something else
/// stands there, the tokenizer is missing, or the disk refuses.
Exported export_model(const LoadedModel& model, Backend& backend, const std::filesystem::path& folder,
                      const ExportOptions& options = {});

/// UserError: what stands at `folder` would not be replaced. For those who work long before they export.
void require_room_for_export(const std::filesystem::path& folder);
/// The same, and all else that export_model() would refuse before it writes weights: a place where no folder
/// can be made, a tokenizer that is not there or not the model's.
void require_exportable(const LoadedModel& model, const std::filesystem::path& folder,
                        const ExportOptions& options = {});

/// The type of its weights that loses nothing of them: BF16 when all are, else F32 (of which F64 may lose
/// some). UserError: as load_exported_model, of its files.
DType exchange_dtype(const std::filesystem::path& path);

/// Whether `path` is such a folder, or its config.json.
bool is_exported_model(const std::filesystem::path& path);

/// Loads one: what export_model wrote, or a Llama or Qwen3 of another program. UserError: a feature that
/// Fathom has not (it is named), a tensor that is missing, too many or of another shape, a damaged file.
LoadedModel load_exported_model(const std::filesystem::path& path,
                                const std::function<Context&(const Config&)>& context_for);

}  // namespace fathom
