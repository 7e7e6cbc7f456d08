// The text of single tokens, for lists of log-probabilities.
#pragma once

#include <cstdint>
#include <string>

#include "src/io/tokenizer.h"

namespace fathom::serve {

class TokenTexts {
 public:
  explicit TokenTexts(const Tokenizer& tokenizer);

  /// The bytes that the token adds to a text; of control tokens what a listing calls them.
  std::string bytes(std::int32_t id) const;
  /// The same as OpenAI writes it: text, or "bytes:\xe2\x82" for what is no whole character.
  std::string shown(std::int32_t id) const;
  /// Of one token, at most: a text of n bytes has n / longest() tokens or more.
  std::size_t longest() const { return longest_; }

 private:
  const Tokenizer& tokenizer_;
  std::int32_t before_ =
      -1;  // a token with a text, in front: a tokenizer may treat the first one in its own way
  std::size_t before_bytes_ = 0;
  std::size_t longest_ = 1;
};

}  // namespace fathom::serve
