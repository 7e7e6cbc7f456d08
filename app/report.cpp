// fathom report RUN... -o FILE.html [--json]: runs side by side in one self-contained page.
#include "train/report/report.h"

#include <filesystem>
#include <iostream>
#include <memory>

#include <spdlog/spdlog.h>

#include "app/command.h"

namespace fathom::app {

void add_report(CLI::App& app, Globals& globals) {
  struct Options {
    std::vector<std::filesystem::path> runs;
    std::filesystem::path out = "report.html";
  };
  auto options = std::make_shared<Options>();
  CLI::App& sub = *app.add_subcommand("report", "Show runs side by side in one self-contained HTML page");
  add_global_flags(sub, globals);
  sub.add_option("RUN", options->runs, "Run folders, as fathom train --run-dir wrote them")->required();
  sub.add_option("-o,--output", options->out, "The page to write; a .csv goes beside it")
      ->capture_default_str();
  sub.footer("Example: fathom report runs/dense runs/mod -o compare.html");
  sub.callback([options, &globals] {
    write_report(options->runs, options->out);
    if (globals.json) {
      std::cout << report_json(options->runs) << std::endl;
    } else {
      std::cout << report_text(options->runs) << std::flush;
      spdlog::info("wrote {} and, beside it, the same figures as .csv", options->out.string());
    }
  });
}

}  // namespace fathom::app
