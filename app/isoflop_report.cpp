// fathom isoflop fit and report: what a sweep's table says.
#include <iostream>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "app/isoflop.h"
#include "kernels/error.h"
#include "src/io/atomic_file.h"
#include "train/isoflop/paper_claims.h"
#include "train/isoflop/plan.h"
#include "train/isoflop/sweep_report.h"

namespace fathom::app {
namespace {

using isoflop::FitOptions;
using isoflop::Row;
using Json = nlohmann::ordered_json;

struct FitFlags {
  SweepFlags sweep;
  std::string from_csv;
  std::string size = "active";
  FitOptions options;
  std::string output = "isoflop.html";

  std::vector<Row> rows() const {
    if (from_csv.empty() == sweep.sweep.empty())
      throw UsageError(
          "the figures come from a SWEEP or from --from-csv FILE; exactly one of them is needed.");
    if (!from_csv.empty()) return isoflop::read_csv(read_file(from_csv, "sweep's CSV"), from_csv);
    const isoflop::Sweep loaded = sweep.load();
    const isoflop::SweepFolder folder = sweep.folder(loaded);
    return isoflop::rows_of(loaded, &folder, known_size(loaded, folder));
  }
  FitOptions fit_options() const {
    FitOptions o = options;
    o.size = size == "total" ? isoflop::SizeAxis::Total : isoflop::SizeAxis::Active;
    return o;
  }
};

void print(const isoflop::Fit& fit, const std::vector<Row>& rows, const Globals& globals) {
  const std::vector<isoflop::PaperClaim> claims = isoflop::test_claims(fit, rows);
  if (!globals.json) {
    std::cout << isoflop::fit_text(fit, rows) << "\n" << isoflop::claims_text(claims);
    return;
  }
  Json j = Json::parse(isoflop::fit_json(fit, rows));
  j["claims"] = Json::parse(isoflop::claims_json(claims));
  std::cout << j.dump() << "\n";
}

void add_fit_flags(CLI::App& sub, FitFlags& flags) {
  add_sweep_flags(sub, flags.sweep);
  sub.add_option("--from-csv", flags.from_csv, "Read the table that a report wrote, and nothing else")
      ->type_name("FILE");
  sub.add_option("--size", flags.size,
                 "active | total: the parameters that N counts, without the embedding table")
      ->capture_default_str()
      ->check(CLI::IsMember({"active", "total"}));
  sub.add_option("--replicates", flags.options.replicates, "Of the bootstrap; 0: no intervals")
      ->capture_default_str()
      ->check(number_from_to(0, 1e6));
  sub.add_option("--level", flags.options.level, "Share of the replicates that an interval holds")
      ->capture_default_str()
      ->check(number_from_to(0.5, 0.999));
}

}  // namespace

void add_isoflop_fit(CLI::App& isoflop, Globals& globals) {
  CLI::App* sub = isoflop.add_subcommand("fit", "Fit parabolas, power laws and surfaces to a sweep's cells");
  auto flags = std::make_shared<FitFlags>();
  add_fit_flags(*sub, *flags);
  add_global_flags(*sub, globals);
  sub->footer("Example: fathom isoflop fit runs/tiny --size total");
  sub->callback([flags, &globals] {
    const std::vector<Row> rows = flags->rows();
    print(isoflop::fit_rows(rows, flags->fit_options()), rows, globals);
  });
}

void add_isoflop_report(CLI::App& isoflop, Globals& globals) {
  CLI::App* sub = isoflop.add_subcommand("report", "Write a sweep's page and its table as CSV");
  auto flags = std::make_shared<FitFlags>();
  add_fit_flags(*sub, *flags);
  sub->add_option("-o,--output", flags->output, "The page to write; a .csv goes beside it")
      ->capture_default_str();
  add_global_flags(*sub, globals);
  sub->footer(
      "Examples:\n"
      "  fathom isoflop report runs/tiny -o tiny.html\n"
      "  fathom isoflop report --from-csv tiny.csv -o again.html");
  sub->callback([flags, &globals] {
    const std::vector<Row> rows = flags->rows();
    const isoflop::Fit fit = isoflop::write_sweep_report(rows, flags->fit_options(), flags->output);
    print(fit, rows, globals);
    if (!globals.json) spdlog::info("wrote {} and, beside it, the cells as .csv", flags->output);
  });
}

}  // namespace fathom::app
