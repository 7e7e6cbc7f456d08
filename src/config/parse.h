// Reading a configuration: YAML and --set overrides, to a Config that is in range and free of contradictions.
#pragma once

#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "src/config/config.h"

namespace fathom {

/// Reads a YAML file, then applies overrides such as "model.depth=12" in their order. Throws UsageError with
/// one paragraph that names the file and line, the key, its value and what was expected. The result is not
/// resolved.
Config load_config(const std::filesystem::path& path, std::span<const std::string> overrides = {});

/// The same from text; `name` stands for the file in messages.
Config parse_config(std::string_view yaml_text, const std::string& name,
                    std::span<const std::string> overrides = {});

/// Where each given key stands: "base.yaml:12" or "--set model.depth=12"; under the empty key, the file.
using Origins = std::map<std::string, std::string, std::less<>>;

/// Throws UsageError when keys contradict each other. `origins` adds where they stand. Works on resolved and
/// unresolved configurations.
void validate(const Config& config, const Origins& origins = {});

/// What is allowed and still worth saying, one sentence each: a model that cannot be served, for instance.
std::vector<std::string> config_notes(const Config& config);

}  // namespace fathom
