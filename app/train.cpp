// fathom train CONFIG --run-dir DIR
#include <algorithm>
#include <csignal>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <sstream>
#include <string_view>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include "app/command.h"
#include "app/config_flags.h"
#include "app/device.h"
#include "app/gemm_rate.h"
#include "app/plan.h"
#include "app/rank_device.h"
#include "kernels/error.h"
#include "src/config/resolve.h"
#include "src/core/build_info.h"
#include "src/io/checksum.h"
#include "train/comm/host.h"
#include "train/comm/launch.h"
#include "train/comm/open_communicator.h"
#include "train/comm/start_ranks.h"
#include "train/inputs.h"
#include "train/metrics/console.h"
#include "train/ranks.h"
#include "train/trainer.h"

namespace fathom::app {

namespace {

struct TrainFlags {
  ConfigFlags config;
  std::string run_dir;
  std::string resume = "auto";
  double peak = 0;
  bool dry_run = false;
  int gpus = 0;   // processes to start, each with a GPU; 0: none
  int ranks = 0;  // likewise, on whatever device
};

ResumeRequest resume_of(const TrainFlags& flags) {
  if (flags.resume == "auto") return {};
  if (flags.resume == "never") return {.mode = ResumeMode::Never, .from = {}};
  return {.mode = ResumeMode::From, .from = flags.resume};
}

TrainOptions options_of(const TrainFlags& flags, const std::shared_ptr<Backend>& backend) {
  TrainOptions o;
  o.run_dir = flags.run_dir;
  o.resume = resume_of(flags);
  o.peak_flops_per_s = [given = flags.peak, backend](const Config& c) {
    if (given > 0) return given;
    const std::int64_t rows = c.micro_batch_sequences() * c.train.seq_len;
    return gemm_rate(*backend, compute_dtype(*backend, c), rows, c.model.width, 2 * c.model.ffn_hidden);
  };
  o.git_sha = build_info().git_sha;
  o.console_is_terminal = console_kind(STDERR_FILENO) == ConsoleKind::Terminal;
  o.console_width = [] { return terminal_width(STDERR_FILENO); };
  o.plan = [path = flags.config.path](const Config& resolved) { return plan_json(resolved, path); };
  o.total_memory = backend->is_cpu() ? machine_memory() : backend->memory_bytes();
  return o;
}

void print_result(const TrainResult& r, const TrainFlags& flags) {
  const nlohmann::json json = {
      {"run_dir", flags.run_dir},
      {"status", name_of(r.status)},
      {"already_done", r.already_done},
      {"resumed_at", r.resumed_at},
      {"steps", r.state.step},
      {"tokens", r.state.tokens},
      {"flops", r.state.flops},
      {"seconds", r.state.seconds},
      {"loss", r.final_loss},
      {"best_val_loss", r.state.best_step > 0 ? nlohmann::json(r.state.best_val_loss) : nullptr},
      {"checkpoint", r.checkpoint.string()},
      {"message", r.message}};
  std::cout << json.dump() << "\n";
}

// A run that was moved, or whose tokenizer's file was, has a copy of its own.
Config load_config_of(const TrainFlags& flags) {
  Config config = flags.config.load();
  if (flags.run_dir.empty() || flags.config.print) return config;
  Config own = with_own_tokenizer(config, flags.run_dir);
  if (own.data.tokenizer != config.data.tokenizer) {
    spdlog::warn("note: {} (data.tokenizer) is not there; the run's copy takes its place, {}",
                 config.data.tokenizer, own.data.tokenizer);
  }
  return own;
}

// This program's own bytes: ranks of two builds of one commit are two programs.
std::string program_hash() {
  StreamingHash hash;
  std::ifstream file("/proc/self/exe", std::ios::binary);
  std::vector<char> piece(1 << 20);
  while (file.read(piece.data(), static_cast<std::streamsize>(piece.size())) || file.gcount() > 0)
    hash.update(std::string_view(piece.data(), static_cast<std::size_t>(file.gcount())));
  return hash.digest_hex();
}

// Threads of each of several ranks that share this host's cores, unless the launcher gave each its own. All
// ranks call it.
int threads_of(Communicator& ranks) {
  const std::string host = host_name();
  std::vector<std::vector<int>> cores;
  std::size_t mine = 0;
  const std::vector<std::string> all =
      ranks.gather(fmt::format("{}\n{}", host, fmt::join(allowed_cores(), " ")));
  for (std::size_t r = 0; r < all.size(); ++r) {
    std::istringstream in(all[r]);
    std::string of;
    std::getline(in, of);
    if (of != host) continue;
    if (static_cast<int>(r) == ranks.rank()) mine = cores.size();
    cores.emplace_back(std::istream_iterator<int>(in), std::istream_iterator<int>());
  }
  const int threads = threads_beside(cores, mine);
  const auto there = static_cast<std::size_t>(std::max(1L, ::sysconf(_SC_NPROCESSORS_ONLN)));
  if (ranks.rank() == 0 && static_cast<std::size_t>(threads) * cores.size() < there)
    spdlog::warn(
        "The {} ranks of this host have {} of its {} cores each: its launcher bound them. With Open MPI, "
        "--bind-to none gives them all, or --map-by slot:PE=N each N of its own.",
        cores.size(), threads, there);
  return threads;
}

// The number of processes that this one is to start and wait for; 0: it trains itself.
int ranks_to_start(const TrainFlags& flags, Globals& globals, const Launch& launch) {
  const int number = std::max(flags.gpus, flags.ranks);
  if (number == 0) return 0;
  const char* flag = flags.gpus > 0 ? "--gpus" : "--ranks";
  if (launch.launcher != Launcher::None && launch.launcher != Launcher::Own) {
    throw UsageError(
        fmt::format("{} starts processes, and a launcher (mpirun, srun, torchrun) has started {} "
                    "of them already.",
                    flag, launch.size),
        fmt::format("Leave {} out, or start fathom without a launcher.", flag));
  }
  if (flags.gpus > 0) {
    if (globals.device != "auto" && globals.device != "cuda") {
      throw UsageError(
          fmt::format("--gpus {} and --device {} contradict each other.", flags.gpus, globals.device),
          "Give --gpus alone; CUDA_VISIBLE_DEVICES chooses which GPUs, and --ranks N --device cpu "
          "starts processes that compute on the CPU.");
    }
    globals.device = "cuda";
  }
  if (launch.launcher == Launcher::Own) return 0;  // one of those
  if (flags.gpus == 1) require_gpus(1);
  return number > 1 ? number : 0;
}

// `ranks` become those with their devices' collectives, once there are any.
void train_or_plan(const TrainFlags& flags, Globals& globals, std::shared_ptr<Communicator>& ranks) {
  const bool speaks = ranks->rank() == 0;
  if (!speaks) spdlog::set_level(spdlog::level::off);
  if (!ranks->alone()) {
    const int threads = threads_of(*ranks);
    if (globals.threads == 0) globals.threads = threads;
  }
  const Config config = load_config_of(flags);
  if (flags.config.print) {
    if (speaks) print_config(resolve(config), globals);
    return;
  }
  if (flags.dry_run) {
    ranks = open_rank(ranks, globals, config).ranks;
    const Config checked = check_training(config, flags.run_dir, resume_of(flags));
    share_of(checked, ranks->size());
    log_notes(checked);
    if (!speaks) return;
    std::cout << (globals.json ? plan_json(checked, flags.config.path) + "\n"
                               : plan_text(checked, flags.config.path));
    return;
  }
  if (flags.run_dir.empty()) {
    throw UsageError("--run-dir is missing: a training needs a folder for its checkpoints and metrics.",
                     "Give --run-dir DIR.");
  }
  std::signal(SIGPIPE, SIG_IGN);  // a reader of the log that goes away does not end the training
  const RankOnDevice opened = open_rank(ranks, globals, config);
  const std::shared_ptr<Backend>& backend = opened.backend;
  ranks = opened.ranks;
  TrainOptions options = options_of(flags, backend);
  options.ranks = ranks;
  if (!ranks->alone()) options.build = fmt::format("{}, program {}", describe_build(), program_hash());
  const TrainResult result = train(config, options, backend, std::cerr);
  if (speaks && globals.json) {
    print_result(result, flags);
  } else if (speaks && !result.message.empty() && result.status != RunStatus::Failed) {
    std::cerr << result.message << "\n";
  }
  if (result.status == RunStatus::Failed) throw UserError(result.message);
}

void run(const TrainFlags& flags, Globals& globals) {
  const Launch launch = read_launch(process_environment());
  if (const int number = ranks_to_start(flags, globals, launch); number > 0) {
    const auto look_for_gpus = [&] {
      if (flags.gpus > 0) require_gpus(flags.gpus);
    };
    if (const int status = start_ranks(number, look_for_gpus); status != 0) throw SaidElsewhere{status};
    return;
  }
  // It outlives what fails: the others are told, and what GPUs have under way is aborted, before NCCL is
  // given back, which may have to wait for them.
  std::shared_ptr<Communicator> ranks = open_communicator(launch);
  try {
    train_or_plan(flags, globals, ranks);
  } catch (const std::exception& e) {
    if (ranks->alone()) throw;
    // Whatever ended this rank ends them all; one of them tells, and the launcher, which ends all when one
    // has ended, does not come before that.
    std::signal(SIGTERM, SIG_IGN);
    if (!ranks->fail(e.what())) throw;
    throw SaidElsewhere{dynamic_cast<const UsageError*>(&e) != nullptr ? 2 : 1};
  }
}

}  // namespace

void add_train(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<TrainFlags>();
  CLI::App* sub = app.add_subcommand("train", "Train a model, or go on with a training");
  add_config_flags(*sub, flags->config);
  sub->add_option("--run-dir", flags->run_dir, "Folder for checkpoints, metrics and logs (made if absent)")
      ->type_name("DIR");
  sub->add_option("--resume", flags->resume,
                  "auto: go on from the folder's newest checkpoint, if it has one; never: refuse a folder "
                  "that holds a run; PATH: a new run starts from another run's checkpoint")
      ->capture_default_str();
  sub->add_option("--peak-flops", flags->peak,
                  "FLOP/s that MFU is a share of; 0: this machine's own rate of the MLP's matrix product, "
                  "measured first");
  constexpr int kMostRanks = 1024;
  CLI::Option* gpus =
      sub->add_option("--gpus", flags->gpus,
                      "Train on N of this machine's GPUs: starts N processes, which train together")
          ->type_name("N")
          ->check(number_from_to(1, kMostRanks));
  sub->add_option("--ranks", flags->ranks,
                  "Start N processes, which train together on this machine, on the CPU or a GPU each")
      ->type_name("N")
      ->check(number_from_to(1, kMostRanks))
      ->excludes(gpus);
  sub->add_flag("--dry-run", flags->dry_run,
                "Check config, data, device and run folder, print the plan, and stop");
  add_global_flags(*sub, globals);
  sub->footer(
      "Examples:\n"
      "  fathom train configs/quickstart-mod.yaml --run-dir runs/mod\n"
      "  fathom train configs/quickstart-mod.yaml --run-dir runs/mod --set train.lr=2e-3 --set seed=7\n"
      "  fathom train configs/quickstart-mod.yaml --run-dir runs/mod --gpus 8\n"
      "The first Ctrl-C (or SIGTERM) saves and ends with status 0; the same command then goes on where it "
      "stopped.");
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
