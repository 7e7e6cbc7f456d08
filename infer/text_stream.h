// The text of tokens as they come, up to the first stop string.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "src/io/tokenizer.h"

namespace fathom {

/// A token costs the same however long the text is: only the last ones are decoded again, those whose text
/// may still change (Tokenizer::unsettled).
class TextStream {
 public:
  TextStream(const Tokenizer& tokenizer, std::vector<std::string> stops)
      : tokenizer_(tokenizer), stops_(std::move(stops)) {}
  /// The text of tokens that follow others: `before` are the last of these, which a tokenizer may need to see
  /// (one that takes the space in front of a text away would else take it from the first word that is added).
  TextStream(const Tokenizer& tokenizer, std::vector<std::string> stops, std::span<const std::int32_t> before)
      : TextStream(tokenizer, std::move(stops)) {
    if (tokenizer.unsettled(before) > 0) return;
    opening_bytes_ = tokenizer.decode(before).size();
    if (opening_bytes_ > 0) opening_.assign(before.begin(), before.end());
  }

  /// Takes the next token and returns what of the text is certain now and was not before: what could be the
  /// beginning of a stop string waits, and so does what the next token may change.
  std::string add(std::int32_t id);
  /// What waits, at the end of a text that no stop string ended.
  std::string rest();
  /// A stop string came: the text ends before it.
  bool stopped() const { return stopped_; }
  /// The tokenizer's decoding of all tokens so far, up to the stop string.
  const std::string& text() const { return text_; }

 private:
  std::string text_of_pending(std::size_t count) const;
  void settle();

  const Tokenizer& tokenizer_;
  std::vector<std::string> stops_;
  // The first tokens, as many as it takes to have some text. They stand before what is decoded later, as a
  // tokenizer may treat the beginning of a text in another way (SentencePiece takes a space away there).
  std::vector<std::int32_t> opening_;
  std::size_t opening_bytes_ = 0;      // of their text
  std::vector<std::int32_t> pending_;  // the tokens after the settled text
  std::string text_;
  std::size_t settled_ = 0;  // so many bytes of it no token will change
  std::size_t given_ = 0;
  bool stopped_ = false;
};

}  // namespace fathom
