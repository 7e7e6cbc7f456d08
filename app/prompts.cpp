#include "app/prompts.h"

#include <algorithm>
#include <fstream>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "src/io/utf8.h"

namespace fathom::app {

namespace {

// `where` is FILE:LINE.
Prompt prompt_of_line(const std::string& line, const std::string& where) {
  Prompt prompt;
  const auto refuse = [&](const std::string& why) {
    prompt.error =
        fmt::format("{}: expected a JSON object with a string under \"prompt\", and {}.", where, why);
  };
  const auto kind = [](const nlohmann::json& value) {
    const bool vowel = value.is_array() || value.is_object();
    return value.is_null() ? "null" : fmt::format("{} {}", vowel ? "an" : "a", value.type_name());
  };
  const nlohmann::json json = nlohmann::json::parse(line, nullptr, false);
  const char* key = json.contains("prompt") ? "prompt" : "text";
  if (json.is_discarded())
    refuse(utf8_prefix(line) < line.size() ? "the line is not UTF-8" : "the line is not JSON");
  else if (!json.is_object())
    refuse("the line is " + kind(json));
  else if (!json.contains(key))
    refuse("the object has none");
  else if (!json[key].is_string())
    refuse(fmt::format("\"{}\" is {}", key, kind(json[key])));
  else
    prompt.text = json[key].get<std::string>();
  return prompt;
}

}  // namespace

std::vector<Prompt> read_prompts(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw UserError(fmt::format("{} cannot be read.", path));
  std::vector<Prompt> prompts;
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (line.empty()) continue;
    prompts.push_back(prompt_of_line(line, fmt::format("{}:{}", path, number)));
  }
  if (prompts.empty()) throw UserError(fmt::format("{} holds no prompt.", path));
  if (readable(prompts) == 0) throw UserError(prompts.front().error);
  return prompts;
}

std::size_t readable(const std::vector<Prompt>& prompts) {
  return static_cast<std::size_t>(
      std::count_if(prompts.begin(), prompts.end(), [](const Prompt& p) { return p.error.empty(); }));
}

}  // namespace fathom::app
