// The tokenizer of a trained model: the copy in its run folder, or else the file that its config names.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "src/io/tokenizer.h"
#include "src/model/checkpoint.h"

namespace fathom {

/// The names of a run folder's own copy, which a training puts there, and of an exported model's: so a run
/// can be moved, and outlives the file that its config names.
inline constexpr const char* kTokenizerCopy = "tokenizer.model";  // SentencePiece
inline constexpr const char* kTokenizerJson = "tokenizer.json";   // byte-level BPE

/// That of tokenizers of this kind (Tokenizer::kind).
const char* tokenizer_copy_name(std::string_view kind);

/// The tokenizer that `model` was trained with: from `path`, or when that is empty from its run folder, or
/// when that has no copy from where its config says. UserError when it is not there, damaged, or not the one
/// that the checkpoint names by its hash. A model of another program that names none takes any `path`.
/// UsageError: a `path` for a model of bytes.
std::unique_ptr<Tokenizer> tokenizer_of(const LoadedModel& model, const std::string& path = "");

/// The bytes of that tokenizer's file, for a model of other tokens than bytes; the same errors.
std::string tokenizer_model_of(const LoadedModel& model, const std::string& path = "");

}  // namespace fathom
