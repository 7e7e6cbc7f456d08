#include "serve/answer_text.h"

#include <algorithm>

namespace fathom::serve {

namespace {

// The prompt's last tokens, enough for any tokenizer to know that it is in the middle of a text.
std::span<const std::int32_t> tail_of(std::span<const std::int32_t> prompt) {
  constexpr std::size_t kTail = 8;
  return prompt.last(std::min(kTail, prompt.size()));
}

}  // namespace

std::int64_t count_characters(std::string_view text) {
  return std::count_if(text.begin(), text.end(),
                       [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

AnswerText::AnswerText(const Tokenizer& tokenizer, std::vector<std::string> stops,
                       std::span<const std::int32_t> prompt, bool trims)
    : stream_(tokenizer, std::move(stops), tail_of(prompt)), trims_(trims) {}

Piece AnswerText::add(const SampledToken& token, std::vector<SampledToken> alternatives) {
  const std::string_view text = stream_.text();
  waiting_.push_back({token, std::move(alternatives), false, static_cast<std::int64_t>(text.size()),
                      given_characters_ + count_characters(text.substr(static_cast<std::size_t>(given_)))});
  const std::string bytes = stream_.add(token.id);
  return piece(bytes, stream_.stopped());
}

Piece AnswerText::rest() {
  Piece out = piece(stream_.rest(), true);
  for (ShownToken& t : waiting_) out.tokens.push_back(std::move(t));
  waiting_.clear();
  return out;
}

Piece AnswerText::end(const SampledToken& token, std::vector<SampledToken> alternatives) {
  Piece out = rest();
  out.tokens.push_back({token, std::move(alternatives), true, given_, given_characters_});
  return out;
}

Piece AnswerText::piece(const std::string& bytes, bool last) {
  Piece out;
  given_ += static_cast<std::int64_t>(bytes.size());
  given_characters_ += count_characters(bytes);
  out.text = gate_.pass(bytes);
  if (last) out.text += gate_.rest();
  if (trims_) {
    out.text.erase(0, out.text.find_first_not_of(" \t\r\n"));
    trims_ = out.text.empty();
  }
  const auto shown =
      std::find_if(waiting_.begin(), waiting_.end(), [&](const ShownToken& t) { return t.begins >= given_; });
  std::move(waiting_.begin(), shown, std::back_inserter(out.tokens));
  waiting_.erase(waiting_.begin(), shown);
  return out;
}

}  // namespace fathom::serve
