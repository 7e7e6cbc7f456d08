// Tokenizers: text to ids and back. Ids are int32, in [0, vocab_size).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace fathom {

/// Thread-safe: any number of threads may encode and decode with one tokenizer.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  /// The ids of `text`, without any end-of-document or beginning-of-sequence token.
  virtual std::vector<std::int32_t> encode(std::string_view text) const = 0;
  /// The text of `ids`. Control tokens (end of document) give nothing; UserError for an id outside the
  /// vocabulary.
  virtual std::string decode(std::span<const std::int32_t> ids) const = 0;
  /// Of how many of the last of `ids`, in the middle of a text, the decoding may still change when more ids
  /// follow; the text before them stays. 0 for tokenizers whose tokens each have a text of their own.
  virtual std::size_t unsettled(std::span<const std::int32_t> /*ids*/) const { return 0; }

  virtual std::int64_t vocab_size() const = 0;
  /// Identifies the tokenizer: stores and checkpoints remember it. 32 hexadecimal digits, or "bytes".
  virtual std::string hash() const = 0;
  /// "bytes", "sentencepiece" or "bpe" (a tokenizer.json).
  virtual std::string kind() const = 0;
  /// The token that follows every document; -1 when none is known.
  virtual std::int32_t end_of_document() const = 0;
  /// The token that starts a sequence; -1 when there is none.
  virtual std::int32_t bos() const { return -1; }
  /// Whether the programs that the tokenizer comes from put bos() before every text.
  virtual bool starts_with_bos() const { return false; }
  /// How one token reads in a listing: printable, with escapes.
  virtual std::string piece(std::int32_t id) const = 0;
};

/// Bytes as ids 0..255, and 256 for the end of a document.
class ByteTokenizer final : public Tokenizer {
 public:
  static constexpr std::int32_t kEndOfDocument = 256;

  std::vector<std::int32_t> encode(std::string_view text) const override;
  std::string decode(std::span<const std::int32_t> ids) const override;
  std::int64_t vocab_size() const override { return 257; }
  std::string hash() const override { return "bytes"; }
  std::string kind() const override { return "bytes"; }
  std::int32_t end_of_document() const override { return kEndOfDocument; }
  std::string piece(std::int32_t id) const override;
};

/// `text` on one line: control characters, quotes, backslashes and invalid UTF-8 as escapes.
std::string escape_text(std::string_view text);

}  // namespace fathom
