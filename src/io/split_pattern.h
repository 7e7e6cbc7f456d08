// A regular expression that cuts text into pieces, as tokenizers of other programs give it, on PCRE2.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

namespace fathom {

/// `pattern`, written for Oniguruma (what Hugging Face tokenizers run it on), in words that mean the same to
/// PCRE2: \s is Unicode's white space, which the two do not quite agree on. UserError of `origin`: it has
/// something that means another thing to each or is not translated, which is named: \w \b \d . ^ $,
/// possessive quantifiers, back references, sets within sets.
std::string translate_pattern(std::string_view pattern, const std::string& origin);

/// `text` as a pattern that matches nothing else.
std::string literal_pattern(std::string_view text);

/// Thread-safe.
class SplitPattern {
 public:
  /// `pattern` is for PCRE2, in UTF-8. UserError of `origin`: it is no pattern, or matches the empty text.
  SplitPattern(const std::string& pattern, std::string origin);
  ~SplitPattern();
  SplitPattern(SplitPattern&&) noexcept;
  SplitPattern& operator=(SplitPattern&&) noexcept;

  /// Calls `piece` with each match and with what lies between matches, in order: together they are `text`,
  /// which is valid UTF-8; none is empty. UserError: the pattern takes too many steps on this text.
  void split(std::string_view text, const std::function<void(std::string_view)>& piece) const;

 private:
  struct Code;
  std::unique_ptr<Code> code_;
  std::string origin_;
};

}  // namespace fathom
