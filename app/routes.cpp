// fathom routes RUN [-p TEXT | --file PATH | --data STORE]
#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <optional>

#include <fmt/format.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include "app/command.h"
#include "app/trained_model.h"
#include "kernels/error.h"
#include "src/io/atomic_file.h"
#include "src/io/byte_source.h"
#include "src/io/output_file.h"
#include "src/model/model_tokenizer.h"
#include "train/metrics/console.h"
#include "train/report/html.h"
#include "train/routes/draw.h"

namespace fathom::app {

namespace {

using routes::Colours;
using routes::Picture;

constexpr std::int64_t kMostTokens = 16384;  // a page of more is slow to open
constexpr std::int64_t kDefaultOfAText = 4096;
constexpr std::size_t kMostTextBytes = std::size_t{64} << 20;

struct RoutesFlags {
  std::string model, prompt, file, data, tokenizer;
  std::string html, csv;
  std::string rule = "topk";
  std::string color = "auto";
  std::int64_t tokens = 0;
  std::int64_t skip = 0;
  std::optional<double> threshold;
  bool invariant = false;
};

std::string text_of(const RoutesFlags& flags) {
  if (!flags.prompt.empty()) return flags.prompt;
  std::string text(kMostTextBytes + 1, '\0');
  text.resize(open_bytes(flags.file)->read(text));
  if (text.size() <= kMostTextBytes) return text;
  throw UserError(fmt::format("{} is longer than 64 MiB.", flags.file),
                  "Make a store of it with fathom data prepare, and give that with --data.");
}

TokenStore open_store(const RoutesFlags& flags, const Config& config) {
  const std::string& path = flags.data.empty() ? config.data.valid : flags.data;
  if (path.empty()) {
    throw UsageError("No text was given, and the model was trained without data.valid.",
                     "Give one with -p TEXT, --file PATH or --data STORE.");
  }
  return TokenStore::open(path);
}

routes::Text read_text(const RoutesFlags& flags, const LoadedModel& model, const Tokenizer* tokenizer) {
  const bool of_store = flags.prompt.empty() && flags.file.empty();
  const std::int64_t most = of_store ? model.config.train.seq_len : kDefaultOfAText;
  const routes::Range range{flags.skip, flags.tokens > 0 ? flags.tokens : most};
  return of_store ? part_of(open_store(flags, model.config), model, range)
                  : part_of(text_of(flags), *tokenizer, model, range);
}

// Of a store ids can be shown without a tokenizer.
std::unique_ptr<Tokenizer> open_tokenizer(const RoutesFlags& flags, const LoadedModel& model) {
  if (!flags.prompt.empty() || !flags.file.empty() || !flags.tokenizer.empty())
    return tokenizer_of(model, flags.tokenizer);
  try {
    return tokenizer_of(model);
  } catch (const UserError& e) {
    spdlog::warn("Warning: tokens are shown as ids, for want of a tokenizer: {}", e.what());
    return nullptr;
  }
}

Colours colours_of(const std::string& when) {
  const auto variable = [](const char* name) {
    const char* const value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  const std::string term = variable("TERM"), color = variable("COLORTERM");
  const bool rgb = color == "truecolor" || color == "24bit";
  const Colours best = rgb ? Colours::Rgb : Colours::Indexed;
  if (when == "always") return best;
  const bool terminal = ::isatty(STDOUT_FILENO) == 1 && variable("NO_COLOR").empty();
  const bool can = rgb || term.find("256color") != std::string::npos;
  return when == "auto" && terminal && can ? best : Colours::None;
}

void require_writable(const RoutesFlags& flags, const std::string& checkpoint) {
  const std::vector<std::string> inputs{checkpoint, flags.file, flags.data, flags.tokenizer};
  if (!flags.html.empty()) {
    require_no_input("-o", flags.html, inputs);
    require_replaceable(flags.html, "an HTML page", report::is_html_file);
  }
  if (flags.csv.empty()) return;
  require_no_input("--csv", flags.csv, inputs);
  if (flags.csv == flags.html) {
    throw UsageError(fmt::format("the page {} would be overwritten by --csv {}.", flags.html, flags.csv),
                     "Write to another path.");
  }
  require_no_input("--csv", flags.csv, std::vector{flags.html});
  require_replaceable(flags.csv, "a CSV of routes", [](const std::string& path) {
    constexpr std::size_t kEnough = 512;
    return routes::is_csv(start_of_file(path, kEnough));
  });
}

SelectionRule rule_of(const std::string& name, const RoutingConfig& routing, std::uint64_t seed) {
  if (name == "causal") return causal_rule(routing);
  return training_rule(routing, seed, 0);
}

void run(const RoutesFlags& flags, Globals& globals) {
  const int given =
      (flags.prompt.empty() ? 0 : 1) + (flags.file.empty() ? 0 : 1) + (flags.data.empty() ? 0 : 1);
  if (given > 1) {
    throw UsageError(fmt::format(
        "{} texts were given: expected at most one of -p TEXT, --file PATH and --data STORE.", given));
  }
  require_writable(flags, find_checkpoint(flags.model).string());
  const TrainedModel model = open_model(flags.model, {.invariant = flags.invariant}, globals);
  const LoadedModel& loaded = model.loaded;
  RoutingConfig routing = loaded.config.routing;
  if (flags.threshold) routing.causal.threshold = *flags.threshold;
  routes::require_routing(*loaded.model, flags.model);
  const SelectionRule rule = rule_of(flags.rule, routing, loaded.config.seed);
  const std::unique_ptr<Tokenizer> tokenizer = open_tokenizer(flags, loaded);
  Picture p = routes::draw(*model.context, loaded, read_text(flags, loaded, tokenizer.get()), tokenizer.get(),
                           rule, routing.causal.threshold);
  p.name = flags.model;

  if (!flags.html.empty()) write_file(flags.html, routes::page(p));
  if (!flags.csv.empty()) write_file(flags.csv, routes::csv(p));
  if (globals.json) {
    std::cout << routes::json(p) << std::endl;
  } else {
    const auto columns = static_cast<std::size_t>(terminal_width(STDOUT_FILENO));
    std::cout << routes::terminal_text(p, colours_of(flags.color), columns) << std::flush;
  }
  for (const std::string& path : {flags.html, flags.csv})
    if (!path.empty()) spdlog::info("wrote {}", path);
}

}  // namespace

void add_routes(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<RoutesFlags>();
  CLI::App* sub =
      app.add_subcommand("routes", "Show which tokens of a text each routed layer and expert computes");
  sub->add_option("model", flags->model, "Run folder or checkpoint file")->required();
  sub->add_option("-p,--prompt", flags->prompt, "Text to route");
  sub->add_option("--file", flags->file, "File of text to route (also .gz, .xz, .zst)");
  sub->add_option("--data", flags->data,
                  "Token store to route a part of; without a text: the data.valid of its training");
  sub->add_option("--tokens", flags->tokens,
                  "At most this many tokens; 0: of a store one sequence of training, of a text 4096")
      ->capture_default_str()
      ->check(number_from_to(0, static_cast<double>(kMostTokens)));
  sub->add_option("--skip", flags->skip, "Pass over this many tokens first")
      ->capture_default_str()
      ->check(number_from_to(0, 1e15));
  sub->add_option("--rule", flags->rule, "topk: as in training | causal: each token by itself, as in writing")
      ->capture_default_str()
      ->check(CLI::IsMember({"topk", "causal"}));
  sub->add_option("--threshold", flags->threshold, "On sigma(logit) (default: the config's)")
      ->check(number_from_to(0.001, 0.999));
  sub->add_option("-o,--output", flags->html, "Write a self-contained HTML page");
  sub->add_option("--csv", flags->csv, "Write a line a token and layer");
  sub->add_option("--color", flags->color,
                  "auto | always | never; auto: on a terminal, unless NO_COLOR is set")
      ->capture_default_str()
      ->check(CLI::IsMember({"auto", "always", "never"}));
  sub->add_option("--tokenizer", flags->tokenizer, "SentencePiece model (default: the run's)");
  sub->add_flag("--invariant", flags->invariant,
                "Row-invariant kernels, as with invariant: true in the model's config");
  add_global_flags(*sub, globals);
  sub->footer(
      "Examples:\n"
      "  fathom routes runs/mod -p \"The sea was calm.\"\n"
      "  fathom routes runs/mod --data books.valid.h5 -o routes.html --csv routes.csv\n"
      "  fathom routes runs/mod --rule causal --threshold 0.3 --json");
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
