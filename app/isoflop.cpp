// fathom isoflop plan|run|status|fit|report SWEEP: families of models at equal training FLOPs.
#include "app/isoflop.h"

#include <filesystem>
#include <iostream>
#include <memory>

#include <fmt/format.h>

#include "app/command.h"
#include "kernels/error.h"
#include "src/io/token_store.h"
#include "train/isoflop/plan.h"

namespace fathom::app {
namespace {

namespace fs = std::filesystem;
using isoflop::DataSize;
using isoflop::Row;
using isoflop::Sweep;
using isoflop::SweepFolder;

std::optional<DataSize> size_of_store(const Sweep& sweep) {
  const std::string& path = sweep.base.data.train;
  std::error_code error;
  if (path.empty() || !fs::exists(path, error)) return std::nullopt;
  const TokenStore store = TokenStore::open(path);
  return DataSize{store.num_tokens(), store.vocab_size()};
}

struct PlanFlags {
  SweepFlags sweep;
  std::int64_t data_tokens = 0;
  std::int64_t vocab = 0;
  double flops_per_second = 0;
};

DataSize planned_size(const Sweep& sweep, const SweepFolder& folder, const PlanFlags& flags) {
  DataSize size;
  if (flags.data_tokens == 0 || flags.vocab == 0) {
    std::optional<DataSize> found = size_of_store(sweep);
    if (!found) found = folder.data_size();
    size = found.value_or(size);
  }
  if (flags.data_tokens > 0) size.tokens = flags.data_tokens;
  if (flags.vocab > 0) size.vocab = flags.vocab;
  if (size.vocab == 0) size.vocab = sweep.base.model.vocab_size;
  if (size.tokens > 0 && size.vocab > 0) return size;
  throw UsageError(
      fmt::format(
          "{}: data.train {}, so its tokens, which say how often a cell passes over them, and its ids, "
          "which say what a step costs, are unknown.",
          sweep.file.string(),
          sweep.base.data.train.empty() ? "names no token store"
                                        : "is " + sweep.base.data.train + ", which is not there"),
      "Make the store with fathom data prepare, or give --data-tokens N and --vocab N.");
}

void run_plan(const PlanFlags& flags, const Globals& globals) {
  const Sweep sweep = flags.sweep.load();
  const SweepFolder folder = flags.sweep.folder(sweep);
  const DataSize data = planned_size(sweep, folder, flags);
  const isoflop::Decisions decided = folder.decisions(sweep);
  const std::vector<Row> rows = isoflop::rows_of(sweep, &folder, data);
  isoflop::require_few_passes(sweep, rows);
  const isoflop::Rates rates(rows, flags.flops_per_second);
  const isoflop::PlanSummary summary = isoflop::summarise(sweep, rows, rates, decided);
  if (globals.json) {
    std::cout << isoflop::plan_json(sweep, rows, rates, summary, data) << "\n";
  } else {
    std::cout << isoflop::plan_text(sweep, rows, rates, summary, data);
  }
}

void run_status(const SweepFlags& flags, const Globals& globals) {
  const Sweep sweep = flags.load();
  const SweepFolder folder = flags.folder(sweep);
  const std::vector<Row> rows = isoflop::rows_of(sweep, &folder, known_size(sweep, folder));
  const isoflop::Decisions decided = folder.decisions(sweep);
  if (globals.json) {
    std::cout << isoflop::status_json(sweep, folder, rows, decided) << "\n";
  } else {
    std::cout << isoflop::status_text(sweep, folder, rows, decided);
  }
}

void add_plan_command(CLI::App& isoflop, Globals& globals) {
  CLI::App* sub = isoflop.add_subcommand("plan", "What a sweep's cells cost; needs no GPU");
  auto flags = std::make_shared<PlanFlags>();
  add_sweep_flags(*sub, flags->sweep);
  sub->get_option("sweep")->required();
  sub->add_option("--data-tokens", flags->data_tokens, "Tokens of the training store, where it is not there")
      ->check(number_from_to(1, 1e15));
  sub->add_option("--vocab", flags->vocab, "Ids of the training store, where it is not there")
      ->check(number_from_to(1, 16777216));
  sub->add_option("--flops-per-second", flags->flops_per_second,
                  "Speed of this machine, for the time; default: that of the sweep's finished cells")
      ->check(number_from_to(1, 1e30));
  add_global_flags(*sub, globals);
  sub->footer("Example: fathom isoflop plan configs/isoflop/tiny.yaml --flops-per-second 5e10");
  sub->callback([flags, &globals] { run_plan(*flags, globals); });
}

void add_status_command(CLI::App& isoflop, Globals& globals) {
  CLI::App* sub = isoflop.add_subcommand("status", "Which cells are done, running, failed and to do");
  auto flags = std::make_shared<SweepFlags>();
  add_sweep_flags(*sub, *flags);
  sub->get_option("sweep")->required();
  add_global_flags(*sub, globals);
  sub->footer("Example: fathom isoflop status runs/tiny");
  sub->callback([flags, &globals] { run_status(*flags, globals); });
}

}  // namespace

Sweep SweepFlags::load() const {
  const fs::path path = sweep;
  if (isoflop::is_sweep_folder(path)) return isoflop::load_sweep(path / "sweep.yaml", path / "base.yaml");
  return isoflop::load_sweep(path);
}

SweepFolder SweepFlags::folder(const Sweep& loaded) const {
  if (!dir.empty()) return SweepFolder(dir);
  if (isoflop::is_sweep_folder(sweep)) return SweepFolder(sweep);
  return SweepFolder(fs::path("runs") / loaded.name);
}

void add_sweep_flags(CLI::App& sub, SweepFlags& flags) {
  sub.add_option("sweep", flags.sweep, "The sweep's YAML file (docs/isoflop.md), or its folder")
      ->type_name("SWEEP");
  sub.add_option("--dir", flags.dir, "The sweep's folder; default: runs/NAME")->type_name("DIR");
}

DataSize known_size(const Sweep& sweep, const SweepFolder& folder) {
  if (const auto recorded = folder.data_size()) return *recorded;
  throw UserError(
      fmt::format("{} holds no sweep: no cell of {} has run.", folder.path().string(), sweep.name),
      "Run it with fathom isoflop run, or give its folder with --dir.");
}

void add_isoflop(CLI::App& app, Globals& globals) {
  CLI::App* isoflop = app.add_subcommand("isoflop", "Compare families of models at equal training FLOPs");
  isoflop->require_subcommand(1);
  isoflop->footer(
      "Examples:\n"
      "  fathom isoflop plan configs/isoflop/tiny.yaml\n"
      "  fathom isoflop run configs/isoflop/tiny.yaml\n"
      "  fathom isoflop report configs/isoflop/tiny.yaml -o tiny.html");
  add_plan_command(*isoflop, globals);
  add_isoflop_run(*isoflop, globals);
  add_status_command(*isoflop, globals);
  add_isoflop_fit(*isoflop, globals);
  add_isoflop_report(*isoflop, globals);
}

}  // namespace fathom::app
