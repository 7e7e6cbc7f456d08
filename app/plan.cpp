// fathom plan: what a config costs before anything runs. It needs no data and no GPU.
#include "app/plan.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <iostream>
#include <iterator>
#include <memory>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "app/command.h"
#include "app/config_flags.h"
#include "kernels/error.h"
#include "src/config/names.h"
#include "src/config/print.h"
#include "src/config/resolve.h"
#include "src/core/units.h"
#include "src/flops/flops.h"
#include "src/io/token_store.h"
#include "train/scaling.h"

namespace fathom::app {
namespace {

struct PlanFlags {
  ConfigFlags config;
  std::string second;  // a config to stand beside the first
  std::int64_t vocab = 0;
  std::int64_t data_tokens = 0;
  double flops_per_second = 0;
  bool keys = false;
  int gpus = 0;  // 0: not asked for
  int gpus_per_host = 8;
  bool scale_batch = false;
  std::string interconnect = "nvlink", network = "infiniband";
};

struct Plan {
  std::string name;
  Config config;
  ParameterCount parameters;
  FlopTerms forward, train;
  Horizon horizon;
  MemoryEstimate memory;
  double six_n = 0;
};

struct NamedTerm {
  const char* name;
  double FlopTerms::*value;
};
constexpr NamedTerm kTerms[] = {
    {"attention_proj", &FlopTerms::attention_proj},
    {"attention_scores", &FlopTerms::attention_scores},
    {"mlp", &FlopTerms::mlp},
    {"experts", &FlopTerms::experts},
    {"router", &FlopTerms::router},
    {"predictor", &FlopTerms::predictor},
    {"head", &FlopTerms::head},
};

Plan plan_of(const Config& resolved, const std::string& name) {
  Plan p;
  p.name = name;
  p.config = resolved;
  p.parameters = count_parameters(p.config);
  p.forward = forward_flops_per_token(p.config);
  p.train = train_flops_per_token(p.config);
  p.horizon = plan_horizon(p.config);
  p.memory = estimate_memory(p.config);
  p.six_n = six_n_flops_per_token(p.config);
  return p;
}

// The store's vocabulary and size, where the config leaves them to it and the store is there.
void consult_store(const Config& config, PlanFlags& flags) {
  std::error_code error;
  if (config.data.train.empty() || !std::filesystem::exists(config.data.train, error)) return;
  const TokenStore store = TokenStore::open(config.data.train);
  if (flags.vocab == 0) flags.vocab = store.vocab_size();
  if (flags.data_tokens == 0) flags.data_tokens = store.num_tokens();
}

Plan make_plan(const std::string& path, PlanFlags& flags) {
  ConfigFlags one = flags.config;
  one.path = path;
  const Config config = one.load();
  consult_store(config, flags);
  const Config full = resolve(config, flags.vocab > 0 ? std::optional(flags.vocab) : std::nullopt);
  if (full.model.vocab_size == 0) {
    throw UsageError(
        fmt::format(
            "{}: model.vocab_size is 0, which follows the token store's vocabulary, and data.train names no "
            "store that is there.",
            path),
        "Give it with --vocab N, or --set model.vocab_size=N.");
  }
  return plan_of(full, path);
}

std::string shape(const Config& c) {
  const ModelConfig& m = c.model;
  std::string text = fmt::format("{} blocks of width {}, {} heads of {}, hidden {}, vocabulary {}", m.depth,
                                 m.width, m.heads, m.head_dim(), m.ffn_hidden, m.vocab_size);
  if (c.routing.has_experts()) {
    const ExpertsConfig& e = c.routing.experts;
    text += fmt::format("; {} experts, {} of {} tokens each", e.count, expert_tokens(e, c.train.seq_len),
                        c.train.seq_len);
    if (e.noop > 0) text += fmt::format(", {} no-ops", e.noop);
    if (c.routing.experts_choose() && !c.routing.routes_depth())
      text += fmt::format(", causal: {}", name_of(c.routing.method()));
  }
  if (c.routing.routes_depth()) {
    std::int64_t routed = 0;
    for (std::int64_t l = 0; l < m.depth; ++l) routed += c.routing.routes(l) ? 1 : 0;
    text += fmt::format("; {} of them routed, {} of {} tokens, causal: {}", routed,
                        kept_tokens(c.routing.capacity, c.train.seq_len), c.train.seq_len,
                        name_of(c.routing.method()));
  }
  return text;
}

// 1, 2, 4 ... and what was asked for, as far as they can share a step.
std::vector<ScaledStep> scaled_steps(const Plan& p, const PlanFlags& flags) {
  const Cluster cluster{link_of(flags.interconnect), link_of(flags.network), flags.gpus_per_host,
                        flags.flops_per_second};
  const auto step = [&](int gpus) {
    Config config = p.config;
    if (flags.scale_batch) config.train.batch_tokens *= gpus;
    return scaled_step(config, cluster, gpus);
  };
  std::vector<ScaledStep> steps;
  for (int n = 1; n < flags.gpus; n *= 2) {
    try {
      steps.push_back(step(n));
    } catch (const UsageError&) {  // not this number; of the last one the user hears
    }
  }
  steps.push_back(step(flags.gpus));
  return steps;
}

std::string scaling_table(const Plan& p, const PlanFlags& flags) {
  std::string text =
      fmt::format("\nBy several GPUs, foretold: {} FLOP/s each, {} within hosts of {}, {} between them{}\n",
                  format_count(flags.flops_per_second), link_of(flags.interconnect).name, flags.gpus_per_host,
                  link_of(flags.network).name, flags.scale_batch ? "; each GPU keeps the whole batch" : "");
  text += fmt::format("  {:>4}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}{:>12}{:>11}{:>12}\n", "GPUs", "tokens",
                      "compute ms", "reduce ms", "hidden ms", "gather ms", "step ms", "tok/s", "efficiency",
                      "memory each");
  for (const ScaledStep& s : scaled_steps(p, flags)) {
    text += fmt::format("  {:>4}{:>12}{:>12.2f}{:>12.2f}{:>12.2f}{:>12.2f}{:>12.2f}{:>12}{:>10.1f}%{:>12}\n",
                        s.gpus, s.tokens, 1e3 * s.compute, 1e3 * s.reduce, 1e3 * s.hidden, 1e3 * s.gather,
                        1e3 * s.step(), format_count(s.tokens_per_second()), 100 * s.efficiency(),
                        format_bytes(s.memory.total()));
  }
  return text;
}

std::string table(const Plan& p, const PlanFlags& flags) {
  std::string text;
  const auto out = std::back_inserter(text);
  const auto row = [&](const std::string& name, const std::string& value) {
    fmt::format_to(out, "  {:<26}{:>12}\n", name, value);
  };
  const TrainConfig& t = p.config.train;
  fmt::format_to(out, "{}\n  {}\n\n", p.name, shape(p.config));
  fmt::format_to(out, "Parameters\n");
  row("total", format_count(static_cast<double>(p.parameters.total)));
  row("active a token", format_count(static_cast<double>(p.parameters.active)));
  fmt::format_to(out, "\nFLOPs a token{:>22}{:>12}{:>10}\n", "forward", "training", "share");
  for (const NamedTerm& term : kTerms) {
    if (p.train.*term.value == 0) continue;
    fmt::format_to(out, "  {:<26}{:>7}{:>12}{:>9.1f}%\n", term.name, format_count(p.forward.*term.value),
                   format_count(p.train.*term.value), 100 * p.train.*term.value / p.train.total());
  }
  fmt::format_to(out, "  {:<26}{:>7}{:>12}\n", "total", format_count(p.forward.total()),
                 format_count(p.train.total()));
  fmt::format_to(out, "  {:<26}{:>7}{:>12}{:>9.1f}%\n", "6 N, for comparison", "", format_count(p.six_n),
                 100 * p.six_n / p.train.total());
  fmt::format_to(out, "\nTraining\n");
  row("tokens a step", fmt::format("{}", t.batch_tokens));
  row("FLOPs a step", format_count(train_flops_per_step(p.config)));
  row("steps", fmt::format("{}", p.horizon.steps));
  row("tokens", format_count(static_cast<double>(p.horizon.tokens)));
  row("FLOPs", fmt::format("{:.4g}", p.horizon.flops));
  if (flags.data_tokens > 0) {
    row("passes over the data", fmt::format("{:.2f}", static_cast<double>(p.horizon.tokens) /
                                                          static_cast<double>(flags.data_tokens)));
  }
  if (flags.flops_per_second > 0) {
    row("time", fmt::format("{} at {}", format_duration(p.horizon.flops / flags.flops_per_second),
                            format_rate(flags.flops_per_second)));
  }
  fmt::format_to(out, "\nMemory, an estimate for training in {}\n", p.config.train.precision);
  row("parameters", format_bytes(p.memory.parameters));
  row("gradients", format_bytes(p.memory.gradients));
  row("optimizer", format_bytes(p.memory.optimizer));
  row("activations", format_bytes(p.memory.activations));
  row("logits of a chunk", format_bytes(p.memory.logits_chunk));
  if (p.memory.workspace > 0) row("workspace of ops", format_bytes(p.memory.workspace));
  if (p.memory.evaluation > 0) row("evaluation", format_bytes(p.memory.evaluation));
  row("total", format_bytes(p.memory.total()));
  if (flags.gpus > 0) text += scaling_table(p, flags);
  return text;
}

nlohmann::ordered_json to_json(const Plan& p, const PlanFlags& flags) {
  nlohmann::ordered_json breakdown, train_breakdown;
  for (const NamedTerm& term : kTerms) {
    breakdown[term.name] = p.forward.*term.value;
    train_breakdown[term.name] = p.train.*term.value;
  }
  nlohmann::ordered_json j{
      {"config", p.name},
      {"params_total", p.parameters.total},
      {"params_active", p.parameters.active},
      {"flops_per_token_forward", p.forward.total()},
      {"flops_per_token_train", p.train.total()},
      {"flops_per_step", train_flops_per_step(p.config)},
      {"tokens", p.horizon.tokens},
      {"steps", p.horizon.steps},
      {"flops_total", p.horizon.flops},
      {"memory_bytes", std::llround(p.memory.total())},
      {"breakdown", breakdown},
      {"breakdown_train", train_breakdown},
      {"memory",
       {{"parameters", std::llround(p.memory.parameters)},
        {"gradients", std::llround(p.memory.gradients)},
        {"optimizer", std::llround(p.memory.optimizer)},
        {"activations", std::llround(p.memory.activations)},
        {"logits_chunk", std::llround(p.memory.logits_chunk)},
        {"workspace", std::llround(p.memory.workspace)},
        {"evaluation", std::llround(p.memory.evaluation)}}},
      {"flops_6nd", p.six_n * static_cast<double>(p.horizon.tokens)},
  };
  if (flags.data_tokens > 0) {
    j["passes"] = static_cast<double>(p.horizon.tokens) / static_cast<double>(flags.data_tokens);
  }
  if (flags.flops_per_second > 0) j["seconds"] = p.horizon.flops / flags.flops_per_second;
  if (flags.gpus > 0) {
    j["scaling"] = nlohmann::ordered_json::array();
    for (const ScaledStep& s : scaled_steps(p, flags)) {
      j["scaling"].push_back({{"gpus", s.gpus},
                              {"tokens", s.tokens},
                              {"compute_seconds", s.compute},
                              {"reduce_seconds", s.reduce},
                              {"hidden_seconds", s.hidden},
                              {"gather_seconds", s.gather},
                              {"step_seconds", s.step()},
                              {"tok_s", s.tokens_per_second()},
                              {"efficiency", s.efficiency()},
                              {"bytes_sent", std::llround(s.bytes_sent)},
                              {"memory_bytes", std::llround(s.memory.total())}});
    }
  }
  return j;
}

void print_comparison(const Plan& a, const Plan& b) {
  fmt::print("A: {}\n   {}\nB: {}\n   {}\n\n", a.name, shape(a.config), b.name, shape(b.config));
  fmt::print("{:<30}{:>14}{:>14}{:>10}\n", "", "A", "B", "B / A");
  const auto row = [](const char* name, double x, double y) {
    const std::string ratio = x > 0 ? fmt::format("{:.3f}", y / x) : "";
    fmt::print("{:<30}{:>14}{:>14}{:>10}\n", name, format_count(x), format_count(y), ratio);
  };
  const auto count = [](std::int64_t n) { return static_cast<double>(n); };
  row("parameters", count(a.parameters.total), count(b.parameters.total));
  row("active parameters a token", count(a.parameters.active), count(b.parameters.active));
  row("FLOPs a token, forward", a.forward.total(), b.forward.total());
  for (const NamedTerm& term : kTerms) {
    if (a.forward.*term.value == 0 && b.forward.*term.value == 0) continue;
    row(fmt::format("  {}", term.name).c_str(), a.forward.*term.value, b.forward.*term.value);
  }
  row("FLOPs a token, training", a.train.total(), b.train.total());
  row("steps", count(a.horizon.steps), count(b.horizon.steps));
  row("tokens", count(a.horizon.tokens), count(b.horizon.tokens));
  row("FLOPs", a.horizon.flops, b.horizon.flops);
  const TrainConfig& t = b.config.train;
  const char* unset = t.tokens ? " --set train.tokens=null" : t.steps ? " --set train.steps=null" : "";
  fmt::print("\nB trains for the FLOPs of A, to the nearest step, with{} --set train.target_flops={}\n",
             unset, a.horizon.flops);
}

void run_plan(PlanFlags flags, const Globals& globals) {
  if (flags.keys) {
    std::cout << config_reference();
    return;
  }
  if (flags.config.path.empty()) throw UsageError("plan needs a CONFIG.", "See fathom plan --help.");
  if (flags.gpus > 0 && flags.flops_per_second <= 0) {
    throw UsageError(
        "--gpus foretells times, and nothing says how fast one GPU is.",
        "Give --flops-per-second, such as 4.7e14: the tflops of fathom bench train for the shape.");
  }
  if (flags.gpus > 0 && !flags.second.empty())
    throw UsageError("--gpus is for one config.", "Leave the second one out.");
  std::vector<Plan> plans{make_plan(flags.config.path, flags)};
  if (flags.config.print) {
    print_config(plans.front().config, globals);
    return;
  }
  if (!flags.second.empty()) plans.push_back(make_plan(flags.second, flags));
  log_notes(plans.back().config);
  if (globals.json) {
    nlohmann::ordered_json j = to_json(plans.front(), flags);
    if (plans.size() == 2) {
      j["other"] = to_json(plans[1], flags);
      j["flops_per_token_ratio"] = plans[1].train.total() / plans[0].train.total();
    }
    std::cout << j.dump() << "\n";
  } else if (plans.size() == 2) {
    print_comparison(plans[0], plans[1]);
  } else {
    std::cout << table(plans.front(), flags);
  }
}

}  // namespace

std::string plan_text(const Config& resolved, const std::string& name) {
  return table(plan_of(resolved, name), {});
}

std::string plan_json(const Config& resolved, const std::string& name) {
  return to_json(plan_of(resolved, name), {}).dump();
}

void add_plan(CLI::App& app, Globals& globals) {
  CLI::App* sub =
      app.add_subcommand("plan", "What a config costs: parameters, FLOPs itemised, steps, memory, time");
  auto flags = std::make_shared<PlanFlags>();
  add_config_flags(*sub, flags->config);
  sub->get_option("config")->required(false);
  sub->add_option("other", flags->second, "A second config, to be compared with the first")
      ->type_name("CONFIG");
  sub->add_option("--vocab", flags->vocab, "Ids of the token store, where model.vocab_size follows it")
      ->check(number_from_to(1, 16777216));
  sub->add_option("--data-tokens", flags->data_tokens, "Tokens of the token store, for the passes over it")
      ->check(number_from_to(1, 1e15));
  sub->add_option("--flops-per-second", flags->flops_per_second, "Speed of this machine, for the time")
      ->check(number_from_to(1, 1e30));
  sub->add_option("--gpus", flags->gpus, "Foretell steps by up to so many GPUs; needs --flops-per-second")
      ->check(number_from_to(1, 1024));
  sub->add_option(
         "--interconnect", flags->interconnect,
         "From GPU to GPU of a host: nvlink | pcie | infiniband | ethernet, or GB/s that one reaches")
      ->capture_default_str();
  sub->add_option("--network", flags->network, "Likewise from host to host")->capture_default_str();
  sub->add_option("--gpus-per-host", flags->gpus_per_host, "GPUs of a host")
      ->capture_default_str()
      ->check(number_from_to(1, 1024));
  sub->add_flag("--scale-batch", flags->scale_batch,
                "Each GPU has train.batch_tokens of a step; default: all share them");
  sub->add_flag("--keys", flags->keys, "Print the table of every config key and stop");
  add_global_flags(*sub, globals);
  sub->footer(
      "Examples:\n"
      "  fathom plan configs/quickstart-dense.yaml configs/quickstart-mod.yaml --vocab 4096\n"
      "  fathom plan configs/d12-dense.yaml --gpus 64 --flops-per-second 4.7e14 --interconnect nvlink "
      "--network infiniband");
  sub->callback([flags, &globals] { run_plan(*flags, globals); });
}

}  // namespace fathom::app
