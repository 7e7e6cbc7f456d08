// One text that is being written: of the engine's tokens, what of them a client may see now.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "infer/sampling.h"
#include "infer/text_stream.h"
#include "serve/utf8_gate.h"

namespace fathom::serve {

/// Code points; of bytes that are none, those that do not look like the rest of one.
std::int64_t count_characters(std::string_view text);

/// A token that a client sees.
struct ShownToken {
  SampledToken token;
  std::vector<SampledToken> alternatives;  // most likely first
  bool ends_document = false;              // no part of the text, which it ended
  std::int64_t begins = 0;                 // bytes of the answer's text before it,
  std::int64_t position = 0;               // and characters (code points)
};

/// What is new to the client.
struct Piece {
  std::string text;  // valid UTF-8
  std::vector<ShownToken> tokens;
};

/// Tokens come out with the text that they begin in: those of a stop string, which is no part of the answer,
/// never do, and those whose text waits come with it.
class AnswerText {
 public:
  /// `prompt`: what the text follows. `trims`: white space at the beginning is left out (chats).
  AnswerText(const Tokenizer& tokenizer, std::vector<std::string> stops, std::span<const std::int32_t> prompt,
             bool trims);

  Piece add(const SampledToken& token, std::vector<SampledToken> alternatives);
  /// At the end of a text that no stop string ended.
  Piece rest();
  /// The same where a token ended the document: it is shown behind the text, and adds nothing to it.
  Piece end(const SampledToken& token, std::vector<SampledToken> alternatives);
  bool stopped() const { return stream_.stopped(); }

 private:
  Piece piece(const std::string& bytes, bool last);

  TextStream stream_;
  Utf8Gate gate_;
  bool trims_;
  std::vector<ShownToken> waiting_;
  std::int64_t given_ = 0;             // bytes of the stream that passed on to the gate,
  std::int64_t given_characters_ = 0;  // and characters
};

}  // namespace fathom::serve
