#include "app/speculation.h"

#include <charconv>
#include <iostream>
#include <optional>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>
#include <spdlog/spdlog.h>

#include "app/speculation_room.h"
#include "infer/text_stream.h"
#include "kernels/error.h"
#include "src/core/stopwatch.h"

namespace fathom::app {

namespace {

/// What came, and when.
struct Answer {
  std::vector<std::int32_t> ids;
  std::string finish;
  double first_seconds = 0, last_seconds = 0;  // of the first token, and of the last
  std::size_t first_tokens = 0;                // that came with the first
};

nlohmann::json json_of(const SpeculationReport& report, const std::string& method) {
  nlohmann::json json = {{"method", method},
                         {"levels", levels_json(report)},
                         {"tokens_per_verification", report.tokens_a_pass()},
                         {"decode_seconds", report.seconds}};
  json["estimated_speedup"] = report.speedup() > 0 ? nlohmann::json(report.speedup()) : nullptr;
  return json;
}

void summarise(const SpeculationReport& report) {
  std::string line = fmt::format("{} tokens in {} verifications, {:.2f} each", report.tokens,
                                 report.levels.back().counts.passes, report.tokens_a_pass());
  for (std::size_t i = 1; i < report.levels.size(); ++i) {
    const LevelCounts& n = report.levels[i].counts;
    line += fmt::format("; {} took {} of {} tested proposals of {}", report.levels[i].name, n.accepted,
                        n.tested, report.levels[i - 1].name);
    if (n.tested > 0)
      line +=
          fmt::format(" ({:.0f} %)", 100.0 * static_cast<double>(n.accepted) / static_cast<double>(n.tested));
  }
  if (report.speedup() > 0)
    line += fmt::format("; about {:.2f} times plain decoding's speed", report.speedup());
  spdlog::info("{}", line);
}

}  // namespace

nlohmann::json levels_json(const SpeculationReport& report) {
  nlohmann::json levels = nlohmann::json::array();
  for (const LevelReport& l : report.levels) {
    const LevelCounts& n = l.counts;
    nlohmann::json level = {{"name", l.name},         {"passes", n.passes},
                            {"proposed", n.proposed}, {"tested", n.tested},
                            {"accepted", n.accepted}, {"tokens", n.tokens},
                            {"seconds", n.seconds},   {"settle_seconds", n.settle_seconds}};
    if (n.passes > 0) level["pass_ms"] = 1e3 * (n.seconds - n.settle_seconds) / static_cast<double>(n.passes);
    level["acceptance"] =
        n.tested > 0 ? nlohmann::json(static_cast<double>(n.accepted) / static_cast<double>(n.tested))
                     : nullptr;
    if (l.gatherings > 0) level["gatherings"] = l.gatherings;
    levels.push_back(std::move(level));
  }
  return levels;
}

void generate_by_speculation(const SpeculationFlags& flags, const SpeculativeText& text,
                             const Globals& globals) {
  const Transformer& model = *text.model.loaded.model;
  const SpeculationRoom room(flags, text);

  const Stopwatch watch;
  Speculation speculation(room.target(), room.draft(), room.options(), text.request);
  if (!globals.json) std::cout << text.prompt << std::flush;
  std::optional<TextStream> stream;
  if (text.tokenizer != nullptr) stream.emplace(*text.tokenizer, text.stops);
  Answer a;
  std::optional<UserError> failure;
  while (a.finish.empty()) {
    Speculation::Step step;
    try {
      step = speculation.step();
    } catch (const UserError& e) {
      failure = e;
      a.finish = name_of(Finish::Error);
      break;
    }
    a.last_seconds = watch.seconds();
    if (a.first_tokens == 0) a.first_seconds = a.last_seconds, a.first_tokens = step.tokens.size();
    a.finish = name_of(step.finish);
    for (const std::int32_t id : step.tokens) {
      a.ids.push_back(id);
      if (!stream) continue;
      const std::string news = stream->add(id);
      if (!globals.json) std::cout << news << std::flush;
      if (!stream->stopped()) continue;
      a.finish = name_of(Finish::Stop);  // what was chosen behind it is nobody's
      speculation.end(std::ssize(a.ids));
      break;
    }
  }
  const SpeculationReport report = speculation.report();
  if (!globals.json) {
    if (stream && !stream->stopped()) std::cout << stream->rest();
    std::cout << (stream ? "" : fmt::format("{}", fmt::join(a.ids, ","))) << "\n" << std::flush;
    if (failure) throw UserError(*failure);
    summarise(report);
    return;
  }
  nlohmann::json json = {
      {"tokens", a.ids}, {"finish_reason", a.finish}, {"prompt_tokens", text.request.prompt.size()}};
  const double decoded = static_cast<double>(a.ids.size()) - static_cast<double>(a.first_tokens);
  json["prefill_tokens_per_s"] =
      a.ids.empty() ? nlohmann::json(nullptr)
                    : nlohmann::json(static_cast<double>(text.request.prompt.size()) / a.first_seconds);
  json["decode_tokens_per_s"] =
      decoded > 0 ? nlohmann::json(decoded / (a.last_seconds - a.first_seconds)) : nullptr;
  json["text"] = stream ? nlohmann::json(stream->text()) : nullptr;
  if (!text.prompt.empty()) json["prompt"] = text.prompt;
  if (failure) json["error"] = failure->what();
  if (const auto layers = model.routed_layers(); !layers.empty()) {
    json["routed_layers"] = layers;
    json["routed_fraction"] = speculation.routed_fraction();
  }
  if (!speculation.experts().rows.empty()) json["expert_fraction"] = speculation.experts().shares();
  json["speculation"] = json_of(report, flags.method);
  std::cout << json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n" << std::flush;
  if (failure) throw UserError(*failure);
}

void add_level_flags(CLI::App& sub, SpeculationFlags& flags) {
  sub.add_option(
      "--draft", flags.draft,
      "With --speculate triforce or draft: self-skip (the model without its routed blocks), ngram, or a "
      "model of the same tokenizer; default: self-skip where there are routed blocks, else ngram");
  sub.add_option(
         "--retrieval-budget", flags.budget,
         "Entries a layer that are retrieved; default: 4096, or a quarter of the context where that is less")
      ->check(number_from_to(1, 1e9));
  sub.add_option("--retrieval-chunk", flags.chunk, "Neighbours that are retrieved together")
      ->capture_default_str()
      ->check(number_from_to(1, 1024));
  sub.add_option(
         "--gamma", flags.proposals,
         "Proposals a pass of the model, 1 to 16; auto: as many as pay, by what passes took and what was "
         "accepted, none included")
      ->capture_default_str()
      ->check(CLI::Validator(
          [](const std::string& value) {
            std::int64_t n = 0;
            const char* end = value.data() + value.size();
            const auto [stop, error] = std::from_chars(value.data(), end, n);
            const bool is_number = error == std::errc() && stop == end && n >= 1 && n <= 16;
            return value == "auto" || is_number
                       ? std::string()
                       : fmt::format("'{}' is neither auto nor a number from 1 to 16", value);
          },
          "1 - 16 | auto"));
  sub.add_option("--gamma-between", flags.proposals_between,
                 "With triforce and a number as --gamma: proposals a pass over what was retrieved")
      ->capture_default_str()
      ->check(number_from_to(1, 8));
  sub.add_option("--draft-window", flags.window, "Latest tokens that a draft sees, at least")
      ->capture_default_str()
      ->check(number_from_to(1, 1e6));
  sub.add_option("--draft-sinks", flags.sinks, "First tokens that it sees")
      ->capture_default_str()
      ->check(number_from_to(0, 1e6));
  sub.add_option(
         "--coupling", flags.coupling,
         "ratio: proposals are taken by the ratio of probabilities | gumbel: by noise of (seed, position) "
         "that all levels share, so that the text does not depend on the draft")
      ->capture_default_str()
      ->check(CLI::IsMember({"ratio", "gumbel"}));
}

void add_speculation_flags(CLI::App& sub, SpeculationFlags& flags) {
  sub.add_option(
         "--speculate", flags.method,
         "triforce | retrieval | draft | ngram: several tokens a pass of the model, distributed as without "
         "it; plain: none, to compare with")
      ->check(CLI::IsMember({"triforce", "retrieval", "draft", "ngram", "plain"}));
  add_level_flags(sub, flags);
}

void check_speculation_flags(const CLI::App& sub, const SpeculationFlags& flags) {
  for (const char* name : {"--draft", "--retrieval-budget", "--retrieval-chunk", "--gamma", "--gamma-between",
                           "--draft-window", "--draft-sinks", "--coupling"}) {
    if (!flags.asked() && sub.count(name) > 0)
      throw UsageError(fmt::format("{} goes with --speculate.", name),
                       "Say how: --speculate triforce, for one.");
  }
  const bool drafts = flags.method == "triforce" || flags.method == "draft";
  if (flags.asked() && !drafts && sub.count("--draft") > 0)
    throw UsageError(fmt::format("--speculate {} has no use for --draft.", flags.method),
                     "Take --speculate triforce or draft, or leave it out.");
}

}  // namespace fathom::app
