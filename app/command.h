// One file a subcommand: each offers add_NAME(app, globals), which declares its flags and a callback that
// runs it.
#pragma once

#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "src/config/config.h"

namespace fathom::app {

/// Flags that every subcommand shares.
struct Globals {
  bool json = false;  // one JSON object (or JSON lines) on standard output and nothing else there
  bool verbose = false;
  std::string device = "auto";  // cpu | cuda[:N] | auto
  int threads = 0;              // 0: all cores
};

/// Thrown by one of several processes that train together: another one tells the user what went wrong.
struct SaidElsewhere {
  int status = 1;
};

/// Declares --json, --device, --threads, --verbose on a subcommand.
void add_global_flags(CLI::App& sub, Globals& globals);

/// A check of a number's range that says the range in words.
CLI::Validator number_from_to(double min, double max);

void add_doctor(CLI::App& app, Globals& globals);
void add_data(CLI::App& app, Globals& globals);
void add_tokenizer(CLI::App& app, Globals& globals);
void add_plan(CLI::App& app, Globals& globals);
void add_train(CLI::App& app, Globals& globals);
void add_eval(CLI::App& app, Globals& globals);
void add_generate(CLI::App& app, Globals& globals);
void add_serve(CLI::App& app, Globals& globals);
void add_export(CLI::App& app, Globals& globals);
void add_import(CLI::App& app, Globals& globals);
void add_quantize(CLI::App& app, Globals& globals);
void add_routes(CLI::App& app, Globals& globals);
void add_report(CLI::App& app, Globals& globals);
void add_bench(CLI::App& app, Globals& globals);
void add_completions(CLI::App& app, Globals& globals);

}  // namespace fathom::app
