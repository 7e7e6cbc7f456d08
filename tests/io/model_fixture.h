// A small SentencePiece model, trained once for all tests of a program.
#pragma once

#include <string>

#include "src/io/sentencepiece_tokenizer.h"
#include "src/io/synthetic_text.h"

namespace fathom::testing {

inline std::string train_model(std::int64_t vocab_size, std::uint64_t seed = 1) {
  int documents = 0;
  const auto next = [&](std::string& document) {
    document =
        synthetic_document(9, static_cast<std::uint64_t>(documents)) + "\tna\xC3\xAFve   caf\xC3\xA9 1234\n";
    return ++documents <= 200;
  };
  SentencePieceTraining settings;
  settings.vocab_size = vocab_size;
  settings.seed = seed;
  return train_sentencepiece(next, settings);
}

/// The bytes of a model of 500 tokens.
inline const std::string& small_model() {
  static const std::string model = train_model(500);
  return model;
}

}  // namespace fathom::testing
