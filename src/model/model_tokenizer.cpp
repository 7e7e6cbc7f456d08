#include "src/model/model_tokenizer.h"

#include <filesystem>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/io/atomic_file.h"
#include "src/io/checksum.h"
#include "src/io/sentencepiece_tokenizer.h"

namespace fathom {

namespace {

namespace fs = std::filesystem;

constexpr const char* kGiveIt = "Give the right one with --tokenizer PATH.";

// Of the run folder that the checkpoint lies in; empty when it lies in none, or there is no copy.
fs::path copy_of(const LoadedModel& model) {
  const fs::path folder = fs::absolute(model.checkpoint).lexically_normal().parent_path();
  if (folder.filename() != "checkpoints") return {};
  fs::path copy = folder.parent_path() / kTokenizerCopy;
  std::error_code error;
  return fs::exists(copy, error) ? copy : fs::path();
}

std::unique_ptr<Tokenizer> load_copy(const fs::path& path, const CheckpointMeta& meta) {
  const std::string bytes = read_file(path.string(), "tokenizer");
  if (const std::string hash = hash_hex(bytes); hash != meta.tokenizer_hash) {
    throw UserError(
        fmt::format("{}, the run's copy of its tokenizer, is damaged or another's: its hash is {}, and "
                    "the model was trained with {}.",
                    path.string(), hash, meta.tokenizer_hash),
        "Put a good copy in its place, or give one with --tokenizer PATH.");
  }
  return make_sentencepiece(bytes, path.string());
}

std::unique_ptr<Tokenizer> load_other(const std::string& path, const CheckpointMeta& meta) {
  std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(path);
  if (tokenizer->hash() == meta.tokenizer_hash) return tokenizer;
  throw UserError(fmt::format("{} is another tokenizer ({}) than the model was trained with ({}).", path,
                              tokenizer->hash(), meta.tokenizer_hash),
                  kGiveIt);
}

}  // namespace

std::unique_ptr<Tokenizer> tokenizer_of(const LoadedModel& model, const std::string& path) {
  if (model.meta.tokenizer_kind == "bytes") {
    if (path.empty() || path == "bytes") return load_tokenizer("bytes");
    throw UsageError(
        fmt::format("--tokenizer {} was given, and the model was trained on bytes, which need no file.",
                    path),
        "Leave --tokenizer out.");
  }
  if (!path.empty()) return load_other(path, model.meta);
  if (const fs::path copy = copy_of(model); !copy.empty()) return load_copy(copy, model.meta);
  const std::string& configured = model.config.data.tokenizer;
  if (configured.empty()) {
    throw UserError(
        "The model's config names no tokenizer (data.tokenizer), so text cannot be turned into tokens.",
        "Give --tokenizer PATH; without one only --prompt-ids can be gone on from.");
  }
  std::error_code error;
  if (!fs::exists(configured, error)) {
    throw UserError(
        fmt::format("{}, the tokenizer that the model's config names (data.tokenizer), is not there, and the "
                    "model has no copy of it in a run folder.",
                    configured),
        kGiveIt);
  }
  return load_other(configured, model.meta);
}

}  // namespace fathom
