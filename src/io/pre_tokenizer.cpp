#include "src/io/pre_tokenizer.h"

namespace fathom {

void PreTokenizer::add_split(const std::string& pattern, const std::string& origin) {
  steps_.emplace_back(SplitPattern(pattern, origin));
}

void PreTokenizer::add_prefix_space() { steps_.emplace_back(std::nullopt); }

void PreTokenizer::split(std::string_view text, const std::function<void(std::string_view)>& word) const {
  if (!text.empty()) run(0, text, word);
}

void PreTokenizer::run(std::size_t step, std::string_view text,
                       const std::function<void(std::string_view)>& word) const {
  if (step == steps_.size()) {
    word(text);
    return;
  }
  const std::optional<SplitPattern>& pattern = steps_[step];
  if (pattern) {
    pattern->split(text, [&](std::string_view part) { run(step + 1, part, word); });
  } else if (text.front() == ' ') {
    run(step + 1, text, word);
  } else {
    run(step + 1, " " + std::string(text), word);
  }
}

}  // namespace fathom
