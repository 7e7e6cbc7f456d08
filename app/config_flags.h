// The flags of every command that reads a config: CONFIG, --set KEY=VALUE and --print-config.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "app/command.h"
#include "src/config/config.h"

namespace fathom::app {

struct ConfigFlags {
  std::string path;
  std::vector<std::string> overrides;  // "model.depth=12", applied in their order
  bool print = false;                  // show the resolved config and do nothing else

  /// The config with its overrides, checked and not yet resolved. Throws UsageError.
  Config load() const;
};

/// Declares the flags on `sub`; `flags` must live as long as the command line.
void add_config_flags(CLI::App& sub, ConfigFlags& flags);

/// Prints the resolved config on standard output: YAML, or with --json {"config_yaml": YAML}.
void print_config(const Config& resolved, const Globals& globals);

/// Logs what is allowed in this config and still worth saying, on standard error.
void log_notes(const Config& config);

}  // namespace fathom::app
