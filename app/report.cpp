// fathom report RUN... -o FILE.html [--json]: runs side by side in one self-contained page.
#include "train/report/report.h"

#include <filesystem>
#include <iostream>
#include <memory>
#include <new>

#include <spdlog/spdlog.h>

#include "app/command.h"
#include "app/trained_model.h"
#include "kernels/error.h"
#include "src/config/parse.h"
#include "src/model/model_tokenizer.h"
#include "train/routes/draw.h"

namespace fathom::app {

namespace {

struct ReportFlags {
  std::vector<std::filesystem::path> runs;
  std::filesystem::path out = "report.html";
  std::int64_t routes = 256;  // tokens
};

bool is_routed(const std::filesystem::path& run) {
  const std::filesystem::path config = run / "config.yaml";
  return std::filesystem::exists(config) && load_config(config).routing.kind != RoutingKind::None;
}

routes::Picture draw(const std::filesystem::path& run, std::int64_t tokens, const Globals& globals) {
  const TrainedModel model = open_model(run.string(), {}, globals);
  const LoadedModel& loaded = model.loaded;
  if (loaded.config.data.valid.empty()) throw UserError("It was trained without data.valid.");
  const TokenStore store = TokenStore::open(loaded.config.data.valid);
  // The middle, as the start may be a title page; whole sequences are before it, as when it is evaluated.
  const std::int64_t seq_len = loaded.config.train.seq_len;
  const routes::Range range{store.num_tokens() / seq_len / 2 * seq_len, tokens};
  return routes::draw(*model.context, loaded, routes::part_of(store, loaded, range),
                      tokenizer_of(loaded).get(), training_rule(loaded.config.routing, loaded.config.seed, 0),
                      loaded.config.routing.causal.threshold);
}

// The pictures of the routed runs. One that cannot be drawn is no reason to have no report.
std::string routes_of(const ReportFlags& flags, std::span<const std::string> names, const Globals& globals) {
  Globals where = globals;
  if (where.device == "auto")
    where.device = "cpu";  // a GPU may be busy with a training, and there is little to do
  std::vector<routes::ReportedRun> reported;
  for (std::size_t i = 0; i < names.size(); ++i) {
    routes::ReportedRun run{names[i], {}, {}};
    try {
      if (!is_routed(flags.runs[i])) continue;
      run.picture = draw(flags.runs[i], flags.routes, where);
    } catch (const UserError& e) {
      run.why_not = e.what();
    } catch (const std::bad_alloc&) {
      run.why_not = "There is not enough memory for the model.";
    }
    reported.push_back(std::move(run));
  }
  return routes::report_section(reported);
}

}  // namespace

void add_report(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<ReportFlags>();
  CLI::App& sub = *app.add_subcommand("report", "Show runs side by side in one self-contained HTML page");
  add_global_flags(sub, globals);
  sub.add_option("RUN", flags->runs, "Run folders, as fathom train --run-dir wrote them")->required();
  sub.add_option("-o,--output", flags->out, "The page to write; a .csv goes beside it")
      ->capture_default_str();
  sub.add_option(
         "--routes", flags->routes,
         "Show the routes of so many tokens from the middle of each routed run's validation text; 0: none")
      ->capture_default_str()
      ->check(number_from_to(0, 4096));
  sub.footer("Example: fathom report runs/dense runs/mod -o compare.html");
  sub.callback([flags, &globals] {
    const ReportSection section = [flags, &globals](std::span<const std::string> names) {
      return flags->routes > 0 ? routes_of(*flags, names, globals) : "";
    };
    write_report(flags->runs, flags->out, section);
    if (globals.json) {
      std::cout << report_json(flags->runs) << std::endl;
    } else {
      std::cout << report_text(flags->runs) << std::flush;
      spdlog::info("wrote {} and, beside it, the same figures as .csv", flags->out.string());
    }
  });
}

}  // namespace fathom::app
