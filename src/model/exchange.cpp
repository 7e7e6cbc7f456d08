#include "src/model/exchange.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <memory>
#include <span>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include "kernels/error.h"
#include "src/io/atomic_file.h"
#include "src/io/load_tokenizer.h"
#include "src/io/safetensors.h"
#include "src/io/transformers_tokenizer.h"
#include "src/model/exchange_config.h"
#include "src/model/exchange_weights.h"
#include "src/model/model_tokenizer.h"

namespace fathom {

namespace {

namespace fs = std::filesystem;

constexpr const char* kConfig = "config.json";
constexpr const char* kGeneration = "generation_config.json";
constexpr const char* kWeights = "model.safetensors";
constexpr const char* kReport = "quantization_report.json";

SafetensorsType type_of(DType dtype) {
  return dtype == DType::BF16 ? SafetensorsType::BF16 : SafetensorsType::F32;
}

// The tensors of a parameter, in the order of their data.
std::vector<SafetensorsEntry> entries_of(const ParameterSpec& spec, const LoadedModel& model, DType dtype) {
  std::vector<SafetensorsEntry> entries;
  for (ExchangePart& part : exchange_parts(spec, model.config.model)) {
    if (spec.is_packed) {
      PackedPart packed = packed_part(part, model.model->quantization()->format(spec));
      entries.push_back(std::move(packed.codes));
      entries.push_back(std::move(packed.scales));
    } else {
      entries.push_back({std::move(part.name), type_of(dtype), std::move(part.shape)});
    }
  }
  return entries;
}

void write_numbers(SafetensorsWriter& out, const std::vector<SafetensorsEntry>& entries,
                   const std::vector<float>& values, DType dtype) {
  std::span<const float> left = values;
  for (const SafetensorsEntry& entry : entries) {
    const auto count = static_cast<std::size_t>(entry.elements());
    out.write(entry.name, to_exchange(left.first(count), dtype));
    left = left.subspan(count);
  }
}

void write_packed(SafetensorsWriter& out, const std::vector<SafetensorsEntry>& entries, Backend& backend,
                  const PackedTensor& packed) {
  const std::vector<std::byte> codes = download_codes(backend, packed);
  const std::vector<float> scales = to_host<float>(backend, packed.scales);
  std::span<const std::byte> codes_left = codes, scales_left = std::as_bytes(std::span(scales));
  for (const SafetensorsEntry& entry : entries) {
    std::span<const std::byte>& left = entry.type == SafetensorsType::F32 ? scales_left : codes_left;
    out.write(entry.name, left.first(entry.bytes()));
    left = left.subspan(entry.bytes());
  }
}

double write_weights(const fs::path& path, const LoadedModel& model, Backend& backend, DType dtype) {
  const ParameterSet& parameters = model.model->parameters();
  std::vector<SafetensorsEntry> all;
  double bytes = 0;
  for (const ParameterSpec& spec : parameters.specs()) {
    for (SafetensorsEntry& entry : entries_of(spec, model, dtype)) {
      bytes += static_cast<double>(entry.bytes());
      all.push_back(std::move(entry));
    }
  }
  const Transformer& of = *model.model;
  const ModelConfig& config = model.config.model;
  const std::int64_t with_means = of.key_means(0).defined() ? config.depth : 0;
  for (std::int64_t layer = 0; layer < with_means; ++layer) {
    all.push_back(key_means_entry(layer, config));
    bytes += static_cast<double>(all.back().bytes());
  }
  SafetensorsWriter out(path.string(), all, {{"format", "pt"}});
  for (const ParameterSpec& spec : parameters.specs()) {
    const std::vector<SafetensorsEntry> entries = entries_of(spec, model, dtype);
    if (spec.is_packed) {
      write_packed(out, entries, backend, parameters.packed(spec.name));
    } else {
      write_numbers(out, entries, to_host<float>(backend, parameters.master(spec.name)), dtype);
    }
  }
  for (std::int64_t layer = 0; layer < with_means; ++layer) {
    const std::vector<float> means = to_floats(backend, of.key_means(layer));
    out.write(key_means_entry(layer, config).name, to_exchange(means, DType::F32));
  }
  out.commit();
  return bytes;
}

// What makes a tokenizer, and says how a program has to use it, in the folders of transformers.
constexpr std::array<std::string_view, 8> kTokenizerFiles = {
    kTokenizerCopy,      kTokenizerJson, "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "added_tokens.json", "merges.txt",   "chat_template.jinja"};

fs::path folder_of(const fs::path& path) {
  std::error_code error;
  return fs::is_directory(path, error) ? path : path.parent_path();
}

// Of a model that was exchanged before, as they are: whether Fathom reads them or not.
std::map<std::string, std::string> copied_tokenizer_files(const LoadedModel& model) {
  std::map<std::string, std::string> files;
  if (!is_exported_model(model.checkpoint)) return files;
  std::error_code error;
  for (const std::string_view name : kTokenizerFiles) {
    const fs::path path = folder_of(model.checkpoint) / name;
    if (fs::is_regular_file(path, error)) files[std::string(name)] = read_file(path.string(), "tokenizer");
  }
  return files;
}

// The tokenizer's files by name. A model of ids that another program made has none.
std::map<std::string, std::string> tokenizer_files(const LoadedModel& model, const std::string& path) {
  if (path.empty()) {
    std::map<std::string, std::string> copied = copied_tokenizer_files(model);
    if (!copied.empty()) return copied;
  }
  if (model.meta.tokenizer_kind == "bytes") return transformers_byte_tokenizer();
  if (model.meta.tokenizer_kind == "bpe")
    return transformers_bpe(tokenizer_model_of(model, path), "the tokenizer");
  if (model.meta.tokenizer_kind != "sentencepiece") return {};
  return transformers_sentencepiece(tokenizer_model_of(model, path), "the tokenizer");
}

TextEnds ends_of(const LoadedModel& model, const std::string& path) {
  TextEnds ends = model.ends;
  if (model.meta.tokenizer_kind == "external") return ends;
  const std::unique_ptr<Tokenizer> tokenizer = tokenizer_of(model, path);
  if (ends.stops.empty() && tokenizer->end_of_document() >= 0) ends.stops = {tokenizer->end_of_document()};
  if (ends.bos < 0) ends.bos = tokenizer->bos();
  return ends;
}

TextEnds read_ends(const fs::path& folder, std::int64_t vocab_size) {
  TextEnds ends;
  for (const char* name : {kGeneration, kConfig}) {  // the first that says something
    const std::string path = (folder / name).string();
    std::error_code error;
    if (!fs::exists(path, error)) continue;
    const TextEnds here = parse_text_ends(read_file(path, "config"), path, vocab_size);
    if (ends.stops.empty()) ends.stops = here.stops;
    if (ends.bos < 0) ends.bos = here.bos;
  }
  return ends;
}

// Whether all that is in the folder is what export_model writes: then, and only then, it may be replaced.
bool is_our_export(const fs::path& folder) {
  std::error_code error;
  if (!fs::is_regular_file(folder / kConfig, error) || fs::is_symlink(folder, error)) return false;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    const std::string name = entry.path().filename().string();
    const bool is_known =
        name == kConfig || name == kGeneration || name == kWeights || name == kReport ||
        std::find(kTokenizerFiles.begin(), kTokenizerFiles.end(), name) != kTokenizerFiles.end();
    if (!is_known || !entry.is_regular_file(error)) return false;
  }
  try {
    const std::string path = (folder / kConfig).string();
    return parse_exchange_config(read_file(path, "config of a model"), path).is_ours;
  } catch (const UserError&) {
    return false;
  }
}

// "model" of "model/".
fs::path without_slash(const fs::path& folder) {
  return folder.has_filename() ? folder : folder.parent_path();
}

// A folder that becomes `folder` when it is complete. Until then its name is this process's own: nothing of
// anybody's stands there.
class NewFolder {
 public:
  explicit NewFolder(fs::path folder)
      : folder_(std::move(folder)), made_(beside(folder_, "export")), old_(beside(folder_, "replaced")) {
    require_room_for_export(folder_);
    std::error_code error;
    if (!fs::create_directories(made_, error)) {
      if (!error) error = std::make_error_code(std::errc::file_exists);
      throw UserError(fmt::format("cannot make the folder {}: {}.", folder_.string(), error.message()));
    }
  }
  ~NewFolder() {
    std::error_code error;
    fs::remove_all(made_, error);
  }
  NewFolder(const NewFolder&) = delete;
  NewFolder& operator=(const NewFolder&) = delete;

  fs::path operator/(const std::string& name) const { return made_ / name; }

  void commit() {
    std::error_code error;
    if (exchange()) return;            // what was there goes with this object
    fs::rename(folder_, old_, error);  // fails where there was none
    fs::rename(made_, folder_, error);
    if (error) {
      const std::string why = error.message();
      fs::rename(old_, folder_, error);
      throw UserError(fmt::format("cannot put the folder {} in place: {}.", folder_.string(), why));
    }
    fs::remove_all(old_, error);
  }

 private:
  // In one step, so that a model is there at every moment; false where there is none yet, or the file system
  // cannot.
  bool exchange() const {
#ifdef RENAME_EXCHANGE
    return ::renameat2(AT_FDCWD, made_.c_str(), AT_FDCWD, folder_.c_str(), RENAME_EXCHANGE) == 0;
#else
    return false;
#endif
  }

  static fs::path beside(const fs::path& folder, const char* what) {
    return folder.parent_path() / fmt::format(".{}.{}-{}", folder.filename().string(), what, ::getpid());
  }

  fs::path folder_, made_, old_;
};

// Of a model that another program wrote. One that Fathom does not read leaves the model its ids.
void find_tokenizer(const fs::path& folder, CheckpointMeta& meta) {
  meta.tokenizer_kind = "external";
  for (const char* name : {kTokenizerCopy, kTokenizerJson}) {
    const std::string path = (folder / name).string();
    std::error_code error;
    if (!fs::exists(path, error)) continue;
    try {
      const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(path);
      // Each kind has its own name, by which it is found again.
      if (tokenizer_copy_name(tokenizer->kind()) != std::string_view(name)) continue;
      meta.tokenizer_kind = tokenizer->kind();
      meta.tokenizer_hash = tokenizer->hash();
      return;
    } catch (const UserError&) {
      continue;  // tokenizer_of says why, when a text is to be read
    }
  }
}

}  // namespace

void require_exportable(const LoadedModel& model, const fs::path& folder, const ExportOptions& options) {
  ends_of(model, options.tokenizer);
  tokenizer_files(model, options.tokenizer);
  NewFolder(without_slash(folder));  // made, and gone again
}

Exported export_model(const LoadedModel& model, Backend& backend, const fs::path& folder,
                      const ExportOptions& options) {
  if (options.dtype != DType::F32 && options.dtype != DType::BF16) {
    throw InternalError(fmt::format("[export] weights of {}", name_of(options.dtype)));
  }
  const TextEnds ends = ends_of(model, options.tokenizer);
  std::map<std::string, std::string> files = tokenizer_files(model, options.tokenizer);
  files[kConfig] =
      exchange_config(model.config, model.meta, options.dtype, ends, model.model->quantization());
  // One that is there says more, such as how to sample.
  const fs::path generation = folder_of(model.checkpoint) / kGeneration;
  std::error_code error;
  const bool has_one = is_exported_model(model.checkpoint) && fs::is_regular_file(generation, error);
  files[kGeneration] =
      has_one ? read_file(generation.string(), "config of generation") : exchange_generation_config(ends);
  NewFolder out(without_slash(folder));
  Exported exported{{}, exchange_type(model.config), 0};
  exported.bytes = write_weights(out / kWeights, model, backend, options.dtype);
  exported.files.emplace_back(kWeights);
  if (options.report) files[kReport] = options.report(exported.bytes);
  for (const auto& [name, text] : files) {
    write_file((out / name).string(), text);
    exported.files.push_back(name);
  }
  out.commit();
  return exported;
}

void require_room_for_export(const fs::path& folder) {
  std::error_code error;
  const fs::path target = without_slash(folder);
  const bool is_free =
      !fs::exists(target, error) || (fs::is_directory(target, error) && fs::is_empty(target, error));
  if (is_free || is_our_export(target)) return;
  throw UserError(fmt::format("{} is there and holds other things than an export, so it is not replaced.",
                              target.string()),
                  "Name another folder with -o.");
}

DType exchange_dtype(const fs::path& path) {
  return ExchangeWeights(folder_of(path)).are_bf16() ? DType::BF16 : DType::F32;
}

bool is_exported_model(const fs::path& path) {
  std::error_code error;
  if (fs::is_directory(path, error)) {
    return fs::exists(path / kConfig, error) && !fs::exists(path / "checkpoints", error);
  }
  return path.filename() == kConfig && fs::exists(path, error);
}

LoadedModel load_exported_model(const fs::path& path,
                                const std::function<Context&(const Config&)>& context_for) {
  LoadedModel loaded;
  const fs::path folder = folder_of(path);
  loaded.checkpoint = folder / kConfig;
  ExchangeConfig read = parse_exchange_config(read_file(loaded.checkpoint.string(), "config of a model"),
                                              loaded.checkpoint.string());
  if (!read.is_ours) find_tokenizer(folder, read.meta);
  loaded.config = std::move(read.config);
  loaded.meta = std::move(read.meta);
  const ExchangeWeights weights(folder);
  const ModelConfig& model = loaded.config.model;
  loaded.ends = read_ends(folder, model.vocab_size);
  const Quantization* quantization = read.quantization ? &*read.quantization : nullptr;
  weights.require(declare_parameters(model, loaded.config.routing).specs(), model, quantization);
  Context& c = context_for(loaded.config);
  loaded.model = quantization != nullptr
                     ? std::make_unique<Transformer>(c, model, loaded.config.routing, *quantization)
                     : std::make_unique<Transformer>(c, model, loaded.config.routing, false);
  ParameterSet& parameters = loaded.model->parameters();
  for (const ParameterSpec& spec : parameters.specs()) {
    if (spec.is_packed) {
      parameters.put_packed(spec.name, weights.read_packed(c, spec, model, quantization->format(spec)));
      continue;
    }
    from_host(c.backend(), parameters.master(spec.name), weights.read(spec, model));
  }
  parameters.refresh_working_copy(c);
  for (std::int64_t layer = 0; quantization != nullptr && quantization->key_means && layer < model.depth;
       ++layer)
    loaded.model->set_key_means(c, layer, weights.read_key_means(layer, model));
  return loaded;
}

}  // namespace fathom
