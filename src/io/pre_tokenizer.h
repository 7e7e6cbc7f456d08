// What cuts text into the words within which byte-pair encoding merges: the pre_tokenizer of a
// tokenizer.json.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "src/io/split_pattern.h"

namespace fathom {

/// Words are cut by one pattern after the other, each within what the one before left.
class PreTokenizer {
 public:
  /// Cuts at the matches of a pattern for PCRE2; `origin` names its file in errors, which are SplitPattern's.
  void add_split(const std::string& pattern, const std::string& origin);
  /// Puts a space before each part so far that does not start with one.
  void add_prefix_space();

  /// Calls `word` with one word after the other. `text` is valid UTF-8. Without prefix spaces the words are
  /// `text` together; none is empty.
  void split(std::string_view text, const std::function<void(std::string_view)>& word) const;

 private:
  void run(std::size_t step, std::string_view text, const std::function<void(std::string_view)>& word) const;

  std::vector<std::optional<SplitPattern>> steps_;  // none: the space
};

/// What ByteLevel cuts by, Radford et al. 2019: contractions, words, numbers, other marks, white space.
inline constexpr std::string_view kByteLevelPattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

}  // namespace fathom
