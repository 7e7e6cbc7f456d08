// fathom bench train: speed of a training step, with the share of this machine's own GEMM rate.
#include <algorithm>
#include <iostream>
#include <memory>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "app/bench_kernels.h"
#include "app/bench_model.h"
#include "app/command.h"
#include "app/device.h"
#include "app/gemm_rate.h"
#include "kernels/error.h"
#include "src/config/resolve.h"
#include "src/core/stopwatch.h"
#include "src/flops/flops.h"
#include "train/optimizer.h"
#include "train/step.h"

namespace fathom::app {

namespace {

struct BenchFlags {
  BenchModel model;
  std::int64_t batch = 8;
  std::int64_t seq = 256;
  std::int64_t documents = 0;
  std::int64_t steps = 20;
  std::string precision;
  bool invariant = false;
  bool deterministic = false;
  bool recompute = false;
};

Config config_of(const BenchFlags& flags) {
  Config c = bench_model(flags.model);
  c.invariant = flags.invariant;
  c.deterministic = flags.deterministic;
  c.data.document_mask = flags.documents > 0;
  c.train.seq_len = flags.seq;
  c.train.batch_tokens = flags.batch * flags.seq;
  c.train.steps = flags.steps;
  c.train.recompute = flags.recompute ? Recompute::Block : Recompute::None;
  return resolve(c);
}

HostBatch random_batch(const BenchFlags& flags) {
  std::mt19937 random(7);
  std::uniform_int_distribution<std::int32_t> any(0, static_cast<std::int32_t>(flags.model.vocab) - 1);
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(flags.batch * flags.seq));
  std::vector<std::int32_t> targets(tokens.size());
  for (auto& t : tokens) t = any(random);
  for (auto& t : targets) t = any(random);
  if (flags.documents == 0)
    return make_host_batch(flags.batch, flags.seq, std::move(tokens), std::move(targets));
  // Each token ends its document with the same probability.
  std::bernoulli_distribution ends(1.0 / static_cast<double>(flags.documents));
  std::vector<std::int32_t> documents(tokens.size());
  const auto seq = static_cast<std::size_t>(flags.seq);
  for (std::size_t i = 0; i < documents.size(); ++i) {
    documents[i] = i % seq == 0 ? 0 : documents[i - 1] + static_cast<std::int32_t>(ends(random));
  }
  HostBatch batch = make_host_batch(flags.batch, flags.seq, std::move(tokens), std::move(targets), documents);
  batch.document_mask = true;
  return batch;
}

void run(const BenchFlags& flags, Globals& globals) {
  Config config = config_of(flags);
  const std::shared_ptr<Backend> backend = open_backend(globals, config);
  config.train.precision = !flags.precision.empty() ? flags.precision : backend->is_cpu() ? "fp32" : "bf16";
  require_precision(*backend, {"--precision", config.train.precision, "--precision fp32"}, globals, config);
  const DType compute = compute_dtype(*backend, config);
  const std::int64_t rows = config.train.batch_tokens;
  // The step's largest kind of product, now, on this machine.
  const double ceiling = gemm_rate(*backend, compute, rows, config.model.width, 2 * config.model.ffn_hidden);
  Context c(backend, compute);
  Transformer model(c, config.model, config.routing, true);
  model.initialise(c, 1);
  model.set_recompute(config.train.recompute);
  AdamW optimizer(c, model.parameters(), config.train);
  config.train.on_spike = OnSpike::Warn;  // what random tokens do to the loss is not what is measured
  StepRunner stepper(c, model, optimizer, config,
                     [batch = random_batch(flags)](std::int64_t, std::int64_t) { return HostBatch(batch); });

  std::vector<double> times;
  double loss = 0;
  constexpr int kWarmUp = 3;
  const std::int64_t steps = flags.steps + kWarmUp;
  const auto launch = [&](std::int64_t i) {
    if (!stepper.launch({i, i * flags.batch, 3e-4, {}})) throw UserError("Stopped by a signal.");
  };
  // As a training does it: from one step's report to the next, the step after it being under way where it
  // can.
  for (std::int64_t i = 0; i < steps; ++i) {
    const Stopwatch watch;
    if (!stepper.launched(i)) launch(i);
    if (stepper.runs_ahead() && i + 1 < steps) launch(i + 1);
    const StepOutcome outcome = stepper.read();
    // What follows such a step makes no update, and would be timed without it.
    if (!outcome.applied) throw UserError(fmt::format("Step {} of the bench is not finite.", i + 1));
    loss = outcome.loss;
    if (i >= kWarmUp) times.push_back(1e3 * watch.seconds());
  }
  std::sort(times.begin(), times.end());
  const double ms = times[times.size() / 2];
  const double rate = train_flops_per_step(config) / (ms * 1e-3);
  const double tensors = static_cast<double>(c.allocator().use().total_peak);
  // As the peer's, which counts its workspaces too.
  const double peak_memory = backend->is_cpu() ? static_cast<double>(peak_resident_bytes())
                                               : tensors + static_cast<double>(backend->workspace_bytes());
  const nlohmann::json json = {
      {"bench", "train"},
      {"device", backend->description()},
      {"preset", flags.model.preset},
      {"variant", flags.model.variant},
      {"capacity", config.routing.routes_depth() ? nlohmann::json(flags.model.capacity) : nullptr},
      {"experts", config.routing.has_experts() ? nlohmann::json(flags.model.experts) : nullptr},
      {"batch", flags.batch},
      {"seq", flags.seq},
      {"vocab", flags.model.vocab},
      {"documents", flags.documents},
      {"invariant", flags.invariant},
      {"recompute", flags.recompute},
      {"params_m", static_cast<double>(count_parameters(config).total) / 1e6},
      {"ms", ms},
      {"ms_min", times.front()},
      {"ms_max", times.back()},
      {"tok_s", static_cast<double>(config.train.batch_tokens) / (ms * 1e-3)},
      {"flops_per_step", train_flops_per_step(config)},
      {"gflops", rate / 1e9},
      {"ceiling_gflops", ceiling / 1e9},
      {"ceiling", backend->is_cpu() ? "OpenBLAS sgemm, rows x width x 2*hidden, same process"
                                    : "cuBLASLt, rows x width x 2*hidden, same process"},
      {"precision", config.train.precision},
      {"deterministic", flags.deterministic},
      {"share_of_ceiling", rate / ceiling},
      {"tensor_memory_gb", tensors / (1 << 30)},
      {"peak_memory_gb", peak_memory / (1 << 30)},
      {"loss", loss}};
  if (globals.json) {
    std::cout << json.dump() << "\n";
    return;
  }
  std::cout << fmt::format(
      "{} {}, batch {} x {} tokens, V {}: {:.1f} ms a step, {:.0f} tok/s, {:.1f} GFLOP/s ({:.0f} % of "
      "this machine's product, {:.1f}), peak memory {:.2f} GiB\n",
      flags.model.preset, flags.model.variant, flags.batch, flags.seq, flags.model.vocab, ms,
      static_cast<double>(config.train.batch_tokens) / (ms * 1e-3), rate / 1e9, 100 * rate / ceiling,
      ceiling / 1e9, peak_memory / (1 << 30));
}

}  // namespace

void add_bench(CLI::App& app, Globals& globals) {
  auto flags = std::make_shared<BenchFlags>();
  CLI::App* bench = app.add_subcommand("bench", "Measure speed against this machine's ceilings");
  bench->require_subcommand(1);
  add_kernel_benches(*bench, globals);
  add_bench_decode(*bench, globals);
  add_bench_requests(*bench, globals);
  add_bench_batch(*bench, globals);
  add_bench_load(*bench, globals);
  add_bench_speculative(*bench, globals);
  CLI::App* sub = bench->add_subcommand(
      "train", "Training steps on random tokens: tok/s, FLOP/s, share of the GEMM rate");
  add_bench_model_flags(*sub, flags->model);
  sub->add_option("--batch", flags->batch, "Sequences")->capture_default_str()->check(number_from_to(1, 1e9));
  sub->add_option("--seq", flags->seq, "Tokens of a sequence")
      ->capture_default_str()
      ->check(number_from_to(1, 1e9));
  sub->add_option("--documents", flags->documents,
                  "Document masks: a document has this many tokens on average; 0: a sequence is one document")
      ->capture_default_str()
      ->check(number_from_to(0, 1e9));
  sub->add_option("--steps", flags->steps, "Steps timed; the median counts")
      ->capture_default_str()
      ->check(number_from_to(1, 1e9));
  sub->add_flag("--invariant", flags->invariant, "Row-invariant kernels");
  sub->add_flag("--deterministic", flags->deterministic, "Bit-equal from run to run");
  sub->add_option("--precision", flags->precision, "bf16 | fp32; default: bf16 on a GPU, fp32 on the CPU")
      ->check(CLI::IsMember({"bf16", "fp32"}));
  sub->add_flag("--recompute", flags->recompute, "Recompute activations by block");
  add_global_flags(*sub, globals);
  sub->footer("Example:\n  fathom bench train --preset d4 --variant mod --json");
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
