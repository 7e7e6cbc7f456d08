#include "src/model/model_tokenizer.h"

#include <filesystem>
#include <vector>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/io/atomic_file.h"
#include "src/io/checksum.h"
#include "src/io/load_tokenizer.h"
#include "src/model/exchange.h"

namespace fathom {

namespace {

namespace fs = std::filesystem;

constexpr const char* kGiveIt = "Give the right one with --tokenizer PATH.";

// Of the run folder that the checkpoint lies in, or of an exported model; empty when it is in neither, or
// there is no copy.
fs::path copy_of(const LoadedModel& model) {
  const fs::path folder = fs::absolute(model.checkpoint).lexically_normal().parent_path();
  if (folder.filename() != "checkpoints" && !is_exported_model(model.checkpoint)) return {};
  const fs::path place = folder.filename() == "checkpoints" ? folder.parent_path() : folder;
  std::vector<const char*> names = {tokenizer_copy_name(model.meta.tokenizer_kind)};
  if (model.meta.tokenizer_hash.empty())
    names = {kTokenizerJson, kTokenizerCopy};  // whichever: to say what is wrong
  std::error_code error;
  for (const char* name : names) {
    if (fs::exists(place / name, error)) return place / name;
  }
  return {};
}

std::string read_copy(const fs::path& path, const CheckpointMeta& meta) {
  std::string bytes = read_file(path.string(), "tokenizer");
  if (meta.tokenizer_hash.empty()) return bytes;  // of another program
  if (const std::string hash = hash_hex(bytes); hash != meta.tokenizer_hash) {
    throw UserError(
        fmt::format("{}, the model's copy of its tokenizer, is damaged or another's: its hash is {}, and "
                    "the model was trained with {}.",
                    path.string(), hash, meta.tokenizer_hash),
        "Put a good copy in its place, or give one with --tokenizer PATH.");
  }
  return bytes;
}

std::string read_other(const std::string& path, const CheckpointMeta& meta) {
  const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(path);
  if (meta.tokenizer_hash.empty() || tokenizer->hash() == meta.tokenizer_hash)
    return read_file(path, "tokenizer");
  throw UserError(fmt::format("{} is another tokenizer ({}) than the model was trained with ({}).", path,
                              tokenizer->hash(), meta.tokenizer_hash),
                  kGiveIt);
}

struct Found {
  std::string bytes, path;
};

Found find_model_file(const LoadedModel& model, const std::string& path) {
  if (!path.empty()) return {read_other(path, model.meta), path};
  if (const fs::path copy = copy_of(model); !copy.empty())
    return {read_copy(copy, model.meta), copy.string()};
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
  return {read_other(configured, model.meta), configured};
}

}  // namespace

const char* tokenizer_copy_name(std::string_view kind) {
  return kind == "sentencepiece" ? kTokenizerCopy : kTokenizerJson;
}

std::unique_ptr<Tokenizer> tokenizer_of(const LoadedModel& model, const std::string& path) {
  if (model.meta.tokenizer_kind == "bytes") {
    if (path.empty() || path == "bytes") return load_tokenizer("bytes");
    throw UsageError(
        fmt::format("--tokenizer {} was given, and the model was trained on bytes, which need no file.",
                    path),
        "Leave --tokenizer out.");
  }
  const Found found = find_model_file(model, path);
  return make_tokenizer(found.bytes, found.path);
}

std::string tokenizer_model_of(const LoadedModel& model, const std::string& path) {
  return find_model_file(model, path).bytes;
}

}  // namespace fathom
