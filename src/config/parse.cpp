#include "src/config/parse.h"

#include <cerrno>
#include <cstring>
#include <fstream>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/config/apply.h"
#include "src/config/document.h"
#include "src/config/keys.h"
#include "src/config/suggest.h"

namespace fathom {
namespace {

void apply(const Entry& entry, Config& config, Origins& origins) {
  const Key* key = find_key(entry.path);
  if (key == nullptr) {
    if (!is_section(entry.path)) {
      throw UsageError(fmt::format("{}: there is no key {}.", entry.where, show_text(entry.path)),
                       suggest_key(entry.path));
    }
    if (entry.form == Entry::Form::Section || entry.form == Entry::Form::Null) return;
    throw UsageError(
        fmt::format("{}: {} is {}, but it is a section.", entry.where, entry.path, show_value(entry)),
        "Write its keys below it, indented by two spaces.");
  }
  if (!key->read(config, *key, entry)) {
    throw UsageError(fmt::format("{}: {} is {}, but it must be {}{}{}.", entry.where, entry.path,
                                 show_value(entry), expectation(*key), key->reason.empty() ? "" : ": ",
                                 key->reason));
  }
  origins[entry.path] = entry.where;
}

}  // namespace

void apply_entries(std::span<const Entry> entries, Config& config, Origins& origins) {
  for (const Entry& entry : entries) apply(entry, config, origins);
}

Config parse_config(std::string_view yaml_text, const std::string& name,
                    std::span<const std::string> overrides) {
  Config config;
  Origins origins{{"", name}};
  apply_entries(read_document(yaml_text, name), config, origins);
  for (const std::string& text : overrides) apply(read_override(text), config, origins);
  validate(config, origins);
  return config;
}

Config load_config(const std::filesystem::path& path, std::span<const std::string> overrides) {
  std::error_code code;
  if (std::filesystem::is_directory(path, code)) {
    throw UsageError(fmt::format("{} is a folder, and a config is a YAML file.", path.string()),
                     "A run folder holds its config as config.yaml.");
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw UsageError(fmt::format("the config {} cannot be read: {}.", path.string(), std::strerror(errno)),
                     "The presets are in configs/.");
  }
  // One byte above the limit of read_document is enough for it to refuse an endless file.
  constexpr std::size_t kMost = (std::size_t{1} << 20) + 1;
  std::string text(kMost, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (file.bad())
    throw UsageError(fmt::format("the config {} cannot be read: {}.", path.string(), std::strerror(errno)));
  text.resize(static_cast<std::size_t>(file.gcount()));
  return parse_config(text, path.string(), overrides);
}

}  // namespace fathom
