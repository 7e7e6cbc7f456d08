#include "app/bench_speculative.h"

#include <iostream>
#include <memory>

#include <fmt/format.h>

#include "app/bench_kernels.h"
#include "kernels/error.h"

namespace fathom::app {

namespace {

void run(SpeculativeBenchFlags& flags, const CLI::App& sub, const Globals& globals) {
  if (!flags.run.empty()) {
    if (flags.text.empty()) {
      throw UsageError("A trained model is measured on texts, and none were given.",
                       "Give --text FILE, one that it was not trained on.");
    }
    if (!flags.acceptance.empty())
      throw UsageError("--acceptance goes with --preset: of a trained model it is measured.");
    bench_measured(flags, globals);
    return;
  }
  if (sub.count("--text") > 0)
    throw UsageError("--text goes with a trained model: fathom bench speculative MODEL --text FILE.");
  if (flags.acceptance.empty()) {
    throw UsageError(
        "A random model takes no proposals: which share is taken has to be given.",
        "Give --acceptance R,D,B (of retrieval by the model, of a draft by the model, of a draft "
        "by retrieval), as measured lines have them, or a trained model.");
  }
  bench_composed(flags, globals);
}

}  // namespace

void print_speculative(nlohmann::json line, const SpeculationReport& report, double plain_seconds,
                       const Globals& globals) {
  const double seconds = report.seconds / static_cast<double>(report.tokens);
  line["levels"] = levels_json(report);
  line["tokens"] = report.tokens;
  line["tokens_per_verification"] = report.tokens_a_pass();
  line["ms"] = 1e3 * seconds;
  line["plain_ms"] = 1e3 * plain_seconds;
  line["speedup"] = plain_seconds / seconds;
  if (globals.json) {
    std::cout << line.dump() << "\n" << std::flush;
    return;
  }
  const auto text = [&](const char* key) { return line.at(key).get<std::string>(); };
  std::string shown = fmt::format(
      "{}: {}{} at {}: {:.3f} ms a token, plainly {:.3f}: {:.2f} times as fast, {:.2f} tokens a verification",
      text("kind"), text("method"),
      text("draft").empty() ? std::string() : fmt::format(" by {}", text("draft")),
      line.at("context").get<std::int64_t>(), 1e3 * seconds, 1e3 * plain_seconds, plain_seconds / seconds,
      report.tokens_a_pass());
  for (const LevelReport& l : report.levels) {
    const LevelCounts& n = l.counts;
    const auto passes = static_cast<double>(std::max<std::int64_t>(1, n.passes));
    shown += fmt::format("; {} {} passes of {:.3f} ms over {:.1f} rows", l.name, n.passes,
                         1e3 * (n.seconds - n.settle_seconds) / passes,
                         1 + static_cast<double>(n.proposed) / passes);
    if (n.tested > 0)
      shown += fmt::format(", {:.1f} % taken",
                           100 * static_cast<double>(n.accepted) / static_cast<double>(n.tested));
  }
  std::cout << shown << "\n" << std::flush;
}

void add_bench_speculative(CLI::App& bench, Globals& globals) {
  auto flags = std::make_shared<SpeculativeBenchFlags>();
  flags->levels.proposals = "6";
  flags->model.model.preset = "d1b";
  flags->model.random_cache = true;
  CLI::App* sub = bench.add_subcommand(
      "speculative", "Speculative decoding against plain: a trained model's, or a random one's at any shape");
  sub->add_option("model", flags->run, "Run folder, checkpoint file or exported model; none: --preset");
  add_engine_bench_flags(*sub, flags->model, globals);
  add_level_flags(*sub, flags->levels);
  sub->add_option("--speculate", flags->methods, "Of retrieval, draft, triforce and ngram; comma-separated")
      ->delimiter(',')
      ->capture_default_str()
      ->check(CLI::IsMember({"retrieval", "draft", "triforce", "ngram"}));
  sub->add_option("--context", flags->contexts, "Tokens of a text before, comma-separated")
      ->delimiter(',')
      ->capture_default_str()
      ->check(number_from_to(2, 1e7));
  sub->add_option("--tokens", flags->tokens, "New tokens of each text")
      ->capture_default_str()
      ->check(number_from_to(16, 1e6));
  sub->add_option("--steps", flags->model.steps, "Plain steps of a random model; the median counts")
      ->capture_default_str()
      ->check(number_from_to(1, 1e6));
  sub->add_option("--temperature", flags->temperature, "0: always the most likely token")
      ->capture_default_str()
      ->check(number_from_to(0.0, 100.0));
  sub->add_option("--text", flags->text, "File that a trained model reads its prompts from");
  sub->add_option("--texts", flags->texts, "Prompts, from evenly spread places of the file")
      ->capture_default_str()
      ->check(number_from_to(1, 1e4));
  sub->add_option(
         "--acceptance", flags->acceptance,
         "R,D,B: of a random model the share of proposals that is taken: retrieval's by the model, a "
         "draft's by the model, a draft's by retrieval")
      ->delimiter(',')
      ->check(number_from_to(0.0, 1.0));
  sub->footer(
      "Examples:\n"
      "  fathom bench speculative runs/big --draft runs/small --text book.txt --context 2048 --json\n"
      "  fathom bench speculative --preset d1b --context 16384,131072 --acceptance 0.9,0.6,0.7 --draft d4");
  sub->callback([flags, sub, &globals] { run(*flags, *sub, globals); });
}

}  // namespace fathom::app
