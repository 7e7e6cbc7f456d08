#include "app/load_work.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>
#include <sys/resource.h>

#include "kernels/error.h"
#include "src/core/splitmix64.h"
#include "src/io/token_store.h"

namespace fathom::app {

void add_load_flags(CLI::App& sub, LoadFlags& flags) {
  sub.add_option("--data", flags.data, "Token store of the model's tokenizer, whose text the prompts are")
      ->required();
  const auto number = [&](const char* name, std::int64_t& value, const char* what) {
    sub.add_option(name, value, what)->capture_default_str()->check(number_from_to(1, 1e6));
  };
  number("--requests", flags.requests, "How many");
  number("--prompt-min", flags.prompt_min, "Tokens of a prompt, at least");
  number("--prompt-max", flags.prompt_max, "and at most");
  number("--new-min", flags.new_min, "New tokens of a text, at least");
  number("--new-max", flags.new_max, "and at most");
  sub.add_option("--temperature", flags.temperature, "Of the sampling; 0: the most likely tokens")
      ->capture_default_str()
      ->check(number_from_to(0, 100));
  sub.add_option("--seed", flags.seed, "Of prompts, lengths, sampling and arrivals")->capture_default_str();
}

std::vector<LoadRequest> load_requests(const LoadFlags& f) {
  if (f.prompt_min > f.prompt_max || f.new_min > f.new_max)
    throw UsageError("The least length is above the greatest.",
                     "Give --prompt-min at most --prompt-max, and --new-min at most --new-max.");
  const TokenStore store = TokenStore::open(f.data);
  if (store.num_tokens() < f.prompt_max)
    throw UserError(fmt::format("{} holds {} tokens, fewer than a prompt of {}.", f.data, store.num_tokens(),
                                f.prompt_max),
                    "Give a lower --prompt-max, or another --data.");
  SplitMix64 random(f.seed);
  const auto from_to = [&](std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(random.below(static_cast<std::uint64_t>(high - low + 1)));
  };
  std::vector<LoadRequest> all(static_cast<std::size_t>(f.requests));
  for (LoadRequest& r : all) {
    r.prompt.resize(static_cast<std::size_t>(from_to(f.prompt_min, f.prompt_max)));
    store.read(from_to(0, store.num_tokens() - static_cast<std::int64_t>(r.prompt.size())), r.prompt);
    r.max_tokens = from_to(f.new_min, f.new_max);
    r.seed = random.below(std::uint64_t{1} << 62);
  }
  return all;
}

double cpu_seconds() {
  rusage use{};
  ::getrusage(RUSAGE_SELF, &use);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(use.ru_utime) + seconds(use.ru_stime);
}

nlohmann::json times_json(std::vector<double>& seconds) {
  nlohmann::json out = {{"count", seconds.size()}};
  for (const auto& [name, p] :
       {std::pair{"min_ms", 0.0}, {"p50_ms", 0.5}, {"p90_ms", 0.9}, {"p99_ms", 0.99}, {"max_ms", 1.0}})
    out[name] = 1e3 * percentile(seconds, p);
  double sum = 0;
  for (const double s : seconds) sum += s;
  out["mean_ms"] = seconds.empty() ? 0 : 1e3 * sum / static_cast<double>(seconds.size());
  return out;
}

double percentile(std::vector<double>& values, double p) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const auto rank = static_cast<std::size_t>(std::ceil(p * static_cast<double>(values.size())));
  return values[std::clamp<std::size_t>(rank, 1, values.size()) - 1];
}

}  // namespace fathom::app
