// fathom isoflop run SWEEP: one worker of a sweep.
#include <csignal>
#include <filesystem>
#include <iostream>
#include <memory>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "app/device.h"
#include "app/isoflop.h"
#include "app/plan.h"
#include "kernels/error.h"
#include "src/core/build_info.h"
#include "src/io/atomic_file.h"
#include "src/io/token_store.h"
#include "train/isoflop/plan.h"
#include "train/isoflop/take_over.h"
#include "train/isoflop/worker.h"

namespace fathom::app {
namespace {

namespace fs = std::filesystem;
using isoflop::DataSize;
using isoflop::Row;
using isoflop::Sweep;
using isoflop::SweepFolder;

struct RunFlags {
  SweepFlags sweep;
  isoflop::WorkOptions options;
  bool no_wait = false;
  std::string from_csv;
};

isoflop::TrainCell trainer_on(const std::shared_ptr<Backend>& backend, bool verbose) {
  return [backend, verbose](const Config& config, const fs::path& run_dir) {
    TrainOptions o;
    o.run_dir = run_dir;
    o.git_sha = build_info().git_sha;
    o.plan = [run_dir](const Config& resolved) { return plan_json(resolved, run_dir.filename().string()); };
    o.total_memory = backend->is_cpu() ? machine_memory() : backend->memory_bytes();
    std::ostream silent(nullptr);  // train.log has it all
    return train(config, o, backend, verbose ? std::cerr : silent);
  };
}

void print_work(const isoflop::WorkResult& r, const Sweep& sweep, const SweepFolder& folder,
                const Globals& globals) {
  if (globals.json) {
    std::cout
        << nlohmann::ordered_json{{"sweep", sweep.name}, {"dir", folder.path().string()},    {"done", r.done},
                                  {"failed", r.failed},  {"running_elsewhere", r.elsewhere}, {"left", r.left},
                                  {"stopped", r.stopped}}
               .dump()
        << "\n";
    return;
  }
  std::string line = fmt::format("{} cells done, {} failed; {} are left", r.done, r.failed, r.left);
  if (r.elsewhere > 0) line += fmt::format(", of which {} run elsewhere", r.elsewhere);
  spdlog::info("{}.{}", line,
               r.stopped ? " Stopped by a signal; the same command goes on from there."
               : r.left == 0
                   ? fmt::format(" Next: fathom isoflop report {} -o report.html", folder.path().string())
                   : "");
}

void take_over(const std::string& path, const Sweep& sweep, const SweepFolder& folder, const DataSize& data) {
  const std::vector<Row> rows = isoflop::read_csv(read_file(path, "sweep's CSV"), path);
  const isoflop::TakenOver t = isoflop::take_over(sweep, folder, data, rows);
  std::string line = fmt::format("{}: {} finished cells taken over", path, t.taken);
  if (t.known > 0) line += fmt::format(", {} were here", t.known);
  if (t.open > 0) line += fmt::format(", {} had not finished", t.open);
  if (t.foreign > 0) line += fmt::format(", {} are no cells of this sweep", t.foreign);
  spdlog::info("{}", line);
}

void run_run(RunFlags flags, const Globals& globals) {
  const Sweep sweep = flags.sweep.load();
  const SweepFolder folder = flags.sweep.folder(sweep);
  if (sweep.base.data.valid.empty())
    throw UsageError(
        fmt::format("{}: data.valid names no token store, and a sweep compares validation losses.",
                    sweep.file.string()),
        "fathom data prepare --valid-fraction makes one.");
  if (sweep.base.data.train.empty())
    throw UsageError(fmt::format("{}: data.train names no token store.", sweep.file.string()),
                     "Make one with fathom data prepare.");
  const std::string& store = sweep.base.data.train;
  const TokenStore opened = TokenStore::open(store);
  const DataSize data{opened.num_tokens(), opened.vocab_size()};
  const std::vector<Row> rows = isoflop::rows_of(sweep, nullptr, data);
  isoflop::require_few_passes(sweep, rows);
  const Config first = config_of(sweep, isoflop::cells_of(sweep, {}).front(), data.vocab);
  check_training(first, {}, {});
  std::signal(SIGPIPE, SIG_IGN);  // a reader of the log that goes away does not end the sweep
  const std::shared_ptr<Backend> backend = open_training_backend(globals, first);
  folder.prepare(sweep, data);
  if (!flags.from_csv.empty()) take_over(flags.from_csv, sweep, folder, data);
  flags.options.wait = !flags.no_wait;
  flags.options.log = [](const std::string& line) { spdlog::info("{}", line); };
  const isoflop::WorkResult result =
      work(sweep, folder, data, trainer_on(backend, globals.verbose), flags.options);
  print_work(result, sweep, folder, globals);
}

}  // namespace

void add_isoflop_run(CLI::App& isoflop, Globals& globals) {
  CLI::App* sub = isoflop.add_subcommand("run", "Train a sweep's cells, or go on with them");
  auto flags = std::make_shared<RunFlags>();
  add_sweep_flags(*sub, flags->sweep);
  sub->get_option("sweep")->required();
  sub->add_option("--only", flags->options.only, "Only cells whose id matches this pattern; may be repeated")
      ->type_name("PATTERN")
      ->expected(1)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false);
  sub->add_option("--max-cells", flags->options.max_cells, "Stop after this many cells; 0: no limit")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  sub->add_flag("--retry-failed", flags->options.retry_failed, "Give cells that failed one more try");
  sub->add_flag("--no-wait", flags->no_wait, "End where further cells depend on what other workers run now");
  sub->add_option("--from-csv", flags->from_csv,
                  "Begin with the finished cells of a table that a report wrote, before other workers start")
      ->type_name("FILE");
  add_global_flags(*sub, globals);
  sub->footer(
      "Examples:\n"
      "  fathom isoflop run configs/isoflop/tiny.yaml\n"
      "  sbatch --array=0-7 --wrap 'fathom isoflop run sweep.yaml --dir /shared/sweep'\n"
      "Any number of these may run on one folder; each takes cells that no other has. The first Ctrl-C (or\n"
      "SIGTERM) saves the cell under way; the same command then goes on, and so it does after kill -9.");
  sub->callback([flags, &globals] { run_run(*flags, globals); });
}

}  // namespace fathom::app
