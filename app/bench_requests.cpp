// fathom bench requests: many texts of mixed lengths through the engine, as a server meets them: tokens a
// second, and how much of the cache they took.
#include <algorithm>
#include <iostream>
#include <memory>
#include <random>

#include <fmt/format.h>

#include "app/bench_engine.h"
#include "app/bench_kernels.h"
#include "kernels/error.h"
#include "src/core/stopwatch.h"
#include "src/core/units.h"

namespace fathom::app {

namespace {

struct RequestsFlags : EngineBenchFlags {
  std::int64_t requests = 256;
  std::int64_t prompt_min = 32, prompt_max = 1024;
  std::int64_t new_min = 16, new_max = 256;
};

struct Lengths {
  std::int64_t prompt = 0, more = 0;
};

// The same for every model and machine.
std::vector<Lengths> lengths_of(const RequestsFlags& f) {
  std::mt19937 random(1);
  // Not a distribution of the standard library's, which each library draws in its own way.
  const auto from_to = [&](std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(high - low + 1));
  };
  std::vector<Lengths> all(static_cast<std::size_t>(f.requests));
  for (Lengths& l : all) {
    l.prompt = from_to(f.prompt_min, f.prompt_max);
    l.more = from_to(f.new_min, f.new_max);
  }
  return all;
}

void submit(Engine& engine, const RequestsFlags& flags, const std::vector<Lengths>& lengths) {
  SamplingOptions any;  // tokens as random as those that the routers were fitted to
  any.temperature = 1000;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    any.seed = i + 1;
    engine.submit({.prompt = random_ids(lengths[i].prompt, flags.model.vocab, static_cast<unsigned>(10 + i)),
                   .max_tokens = lengths[i].more,
                   .sampling = any});
  }
  while (!engine.idle()) step(engine);
}

void run(RequestsFlags flags, const Globals& globals) {
  if (flags.prompt_min > flags.prompt_max || flags.new_min > flags.new_max)
    throw UsageError("The least length is above the greatest.",
                     "Give --prompt-min at most --prompt-max, and --new-min at most --new-max.");
  flags.context = flags.prompt_max;
  const EngineBench s = prepare_engine(flags, globals, flags.new_max, 0, 0);
  const std::vector<Lengths> lengths = lengths_of(flags);
  {  // makes every choice and every block of memory
    Engine engine(*s.c, *s.model, s.options);
    submit(engine, flags,
           {lengths.begin(), lengths.begin() + std::min<std::ptrdiff_t>(8, std::ssize(lengths))});
  }
  Engine engine(*s.c, *s.model, s.options);
  const Stopwatch watch;
  submit(engine, flags, lengths);
  const double seconds = watch.seconds();
  const EngineStats stats = engine.stats();
  nlohmann::json json = line_of("requests", flags, s);
  json.erase("context");
  json["requests"] = flags.requests;
  json["chunk"] = s.options.max_rows;
  json["prompt_tokens"] = stats.prompt_tokens;
  json["new_tokens"] = stats.decoded_tokens;
  json["seconds"] = seconds;
  json["new_tok_s"] = static_cast<double>(stats.decoded_tokens) / seconds;
  json["tok_s"] = static_cast<double>(stats.decoded_tokens + stats.prompt_tokens) / seconds;
  json["steps"] = stats.steps;
  json["whole_steps"] = stats.whole_steps;
  json["cache_bytes"] = stats.most_bytes;
  json["routed_fraction"] = s.config.routing.routes_depth() ? nlohmann::json(kept_share(stats)) : nullptr;
  if (globals.json) {
    std::cout << json.dump() << "\n";
    return;
  }
  std::cout << fmt::format(
                   "{} {}, {} requests, at most {} at the same time: {} tokens of prompts and {} new ones in "
                   "{:.2f} s, "
                   "{:.0f} new tok/s, {:.0f} tok/s in all; at most {} of cache",
                   flags.model.preset, flags.model.variant, flags.requests, flags.batch, stats.prompt_tokens,
                   stats.decoded_tokens, seconds, static_cast<double>(stats.decoded_tokens) / seconds,
                   static_cast<double>(stats.decoded_tokens + stats.prompt_tokens) / seconds,
                   format_bytes(static_cast<double>(stats.most_bytes)))
            << (s.config.routing.routes_depth()
                    ? fmt::format("; routed layers computed {:.1f} %", 100 * kept_share(stats))
                    : "")
            << "\n";
}

}  // namespace

void add_bench_requests(CLI::App& bench, Globals& globals) {
  auto flags = std::make_shared<RequestsFlags>();
  flags->batch = 64;
  CLI::App* sub = bench.add_subcommand("requests", "Many texts of mixed lengths: tok/s, bytes of cache");
  add_engine_bench_flags(*sub, *flags, globals);
  const auto number = [&](const char* name, std::int64_t& value, const char* what) {
    sub->add_option(name, value, what)->capture_default_str()->check(number_from_to(1, 1e6));
  };
  number("--requests", flags->requests, "Texts, all there at the beginning");
  number("--sequences", flags->batch, "Texts at the same time");
  number("--prompt-min", flags->prompt_min, "Tokens of a prompt, at least");
  number("--prompt-max", flags->prompt_max, "and at most");
  number("--new-min", flags->new_min, "New tokens of a text, at least");
  number("--new-max", flags->new_max, "and at most");
  sub->footer("Example:\n  fathom bench requests --preset d6 --variant mod --requests 32 --json");
  sub->callback([flags, &globals] { run(*flags, globals); });
}

}  // namespace fathom::app
