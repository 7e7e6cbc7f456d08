// The text of tokens as they come, up to the first stop string.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "src/io/tokenizer.h"

namespace fathom::app {

class TextStream {
 public:
  TextStream(const Tokenizer& tokenizer, std::vector<std::string> stops)
      : tokenizer_(tokenizer), stops_(std::move(stops)) {}

  /// Takes the next token and returns what of the text is certain now and was not before: what could be the
  /// beginning of a stop string waits.
  std::string add(std::int32_t id);
  /// What waits, at the end of a text that no stop string ended.
  std::string rest();
  /// A stop string came: the text ends before it.
  bool stopped() const { return stopped_; }
  const std::string& text() const { return text_; }

 private:
  const Tokenizer& tokenizer_;
  std::vector<std::string> stops_;
  std::vector<std::int32_t> ids_;
  std::string text_;
  std::size_t given_ = 0;
  bool stopped_ = false;
};

}  // namespace fathom::app
