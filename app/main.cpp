// fathom: one binary, subcommands. Exit status: 0 done, 1 failed, 2 wrong usage.
#include <algorithm>
#include <csignal>
#include <exception>
#include <iostream>
#include <new>
#include <string>

#include <fmt/format.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include "app/command.h"
#include "app/isoflop.h"
#include "kernels/error.h"
#include "src/config/suggest.h"
#include "src/core/build_info.h"

namespace fathom::app {

void add_global_flags(CLI::App& sub, Globals& globals) {
  sub.add_flag("--json", globals.json,
               "Print JSON on standard output and nothing else there; the log goes to stderr");
  sub.add_flag("--verbose", globals.verbose, "Log more")->each([](const std::string&) {
    spdlog::set_level(spdlog::level::debug);
  });
  sub.add_option("--device", globals.device, "cpu | cuda[:N] | auto")->capture_default_str();
  sub.add_option("--threads", globals.threads, "CPU threads; 0: all cores")
      ->capture_default_str()
      ->check(number_from_to(0, 1024));
}

CLI::Validator number_from_to(double min, double max) {
  const std::string range = fmt::format("{:g} to {:g}", min, max);
  const auto check = [min, max, range](const std::string& text) {
    std::size_t end = 0;
    double value = 0;
    try {
      value = std::stod(text, &end);
    } catch (const std::logic_error&) {
      end = 0;  // no number at all
    }
    const bool good = end == text.size() && end > 0 && value >= min && value <= max;
    return good ? std::string() : fmt::format("'{}' is not a number from {}", text, range);
  };
  return CLI::Validator(check, range);
}

namespace {

// A first word that is no command: the sentence that says so, with the command that it resembles most.
std::string unknown_command(const CLI::App& app, const std::string& word) {
  std::string nearest;
  int distance = 3;  // more edits than this are another word
  for (const CLI::App* sub : app.get_subcommands({})) {
    const int d = edit_distance(word, sub->get_name());
    if (d < distance) nearest = sub->get_name();
    distance = std::min(distance, d);
  }
  return fmt::format("'{}' is not a command.{} See fathom --help.", word,
                     nearest.empty() ? "" : fmt::format(" Did you mean {}?", nearest));
}

// One clear paragraph on standard error, whatever was thrown.
int report(const char* kind, const std::string& message, int status) {
  std::cerr << "fathom: " << kind << message << "\n";
  return status;
}

// A fault of the hardware or the driver looks like one of a kernel, so nobody is blamed at once.
constexpr const char* kAfterADeviceFailed =
    " This process cannot use it any more. The same command goes on with a training from its last "
    "checkpoint. "
    "A fault that comes back in the same op is a bug: please report it. One that does not may be the "
    "hardware's or the driver's; nvidia-smi and the kernel's log (Xid) may say more.";

int run(int argc, char** argv) {
  CLI::App app{
      "Fathom trains Mixture-of-Depths language models against FLOP-matched baselines, and serves them."};
  app.set_version_flag("--version", "fathom " + describe_build());
  app.require_subcommand(1);
  app.get_formatter()->column_width(34);
  app.footer("Each command has its own --help. A first run: scripts/quickstart.sh");
  Globals globals;
  add_doctor(app, globals);
  add_data(app, globals);
  add_tokenizer(app, globals);
  add_plan(app, globals);
  add_train(app, globals);
  add_eval(app, globals);
  add_generate(app, globals);
  add_serve(app, globals);
  add_export(app, globals);
  add_import(app, globals);
  add_quantize(app, globals);
  add_routes(app, globals);
  add_isoflop(app, globals);
  add_report(app, globals);
  add_bench(app, globals);
  add_completions(app, globals);
  auto log = spdlog::stderr_color_st("fathom");
  log->set_pattern("%^%v%$");
  spdlog::set_default_logger(log);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& e) {
    return app.exit(e);
  } catch (const CLI::CallForAllHelp& e) {
    return app.exit(e);
  } catch (const CLI::CallForVersion& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    const bool has_command = !app.get_subcommands().empty();
    if (!has_command && argc > 1 && argv[1][0] != '-') return report("", unknown_command(app, argv[1]), 2);
    const std::string help = has_command ? "fathom " + app.get_subcommands().front()->get_name() : "fathom";
    return report("", fmt::format("{} (see {} --help)", e.what(), help), 2);
  }
  return 0;
}

}  // namespace
}  // namespace fathom::app

int main(int argc, char** argv) {
  using fathom::app::kAfterADeviceFailed;
  using fathom::app::report;
  std::signal(SIGXFSZ, SIG_IGN);  // a file over the limit is then an error of write, with a message
  try {
    return fathom::app::run(argc, argv);
  } catch (const fathom::app::SaidElsewhere& e) {
    return e.status;
  } catch (const fathom::UsageError& e) {
    return report("", e.what(), 2);
  } catch (const fathom::UserError& e) {
    return report("", e.what(), 1);
  } catch (const fathom::DeviceError& e) {
    return report("the device failed: ", std::string(e.what()) + kAfterADeviceFailed, 1);
  } catch (const fathom::InternalError& e) {
    return report("internal error (please report it): ", e.what(), 1);
  } catch (const std::bad_alloc&) {
    return report("",
                  "out of memory. Set train.recompute: block, which a run may change at any time, or lower "
                  "train.micro_batch, which it may until its first checkpoint.",
                  1);
  } catch (const std::exception& e) {
    return report("", e.what(), 1);
  }
}
