#include "app/config_flags.h"

#include <iostream>

#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "src/config/parse.h"
#include "src/config/print.h"

namespace fathom::app {

Config ConfigFlags::load() const { return load_config(path, overrides); }

void add_config_flags(CLI::App& sub, ConfigFlags& flags) {
  sub.add_option("config", flags.path, "YAML file; the presets are in configs/")
      ->required()
      ->type_name("CONFIG");
  // One value an occurrence, so that a positional may follow it.
  sub.add_option("--set", flags.overrides, "Override a key, such as --set model.depth=12; may be repeated")
      ->type_name("KEY=VALUE")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);
  sub.add_flag("--print-config", flags.print, "Print the config with every key and default, and stop");
}

void print_config(const Config& resolved, const Globals& globals) {
  if (globals.json) {
    std::cout << nlohmann::json{{"config_yaml", to_yaml(resolved)}}.dump() << "\n";
  } else {
    std::cout << to_yaml(resolved);
  }
}

void log_notes(const Config& config) {
  for (const std::string& note : config_notes(config)) spdlog::warn("note: {}", note);
}

}  // namespace fathom::app
