// SentencePiece models: loading, and training of byte-pair encodings that keep every byte of the text.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "src/io/tokenizer.h"

namespace fathom {

/// A tokenizer from the bytes of a SentencePiece model; `origin` names it in errors. UserError when it is
/// damaged, is no such model, or has no end-of-sentence token (which ends documents).
std::unique_ptr<Tokenizer> make_sentencepiece(std::string_view model, const std::string& origin);

struct SentencePieceTraining {
  std::int64_t vocab_size = 8192;
  /// Lines of text are sampled, each with the same chance, until they fill this many bytes: bounds memory and
  /// time.
  std::int64_t sample_bytes = std::int64_t{20} << 20;
  std::uint64_t seed = 1;  // of the sample
  /// Called after each document with the bytes seen so far; may be empty.
  std::function<void(std::int64_t)> on_text;
  /// Called once all text was read, before the training proper; may be empty.
  std::function<void()> on_train;
};

/// Trains a BPE model on the documents that `next` gives (it returns false after the last). Byte fallback, no
/// normalisation, white space and line ends kept, digits split: decode(encode(x)) == x for every x.
/// Returns the model's bytes, which end in a checksum that make_sentencepiece verifies; other SentencePiece
/// programs read it as well. Equal text and settings give equal bytes.
std::string train_sentencepiece(const std::function<bool(std::string&)>& next,
                                const SentencePieceTraining& settings);

/// Whether the file is a SentencePiece model, one of ours that is damaged included.
bool is_sentencepiece_file(const std::string& path);

}  // namespace fathom
