// The tokenizer of a trained model: the copy in its run folder, or else the file that its config names.
#pragma once

#include <memory>
#include <string>

#include "src/io/tokenizer.h"
#include "src/model/checkpoint.h"

namespace fathom {

/// The name of a run folder's own copy, which a training puts there: so a run can be moved, and outlives the
/// file that its config names.
inline constexpr const char* kTokenizerCopy = "tokenizer.model";

/// The tokenizer that `model` was trained with: from `path`, or when that is empty from its run folder, or
/// when that has no copy from where its config says. UserError when it is not there, damaged, or not the one
/// that the checkpoint names by its hash. UsageError: a `path` for a model of bytes.
std::unique_ptr<Tokenizer> tokenizer_of(const LoadedModel& model, const std::string& path = "");

/// The bytes of that tokenizer's file, for a model of SentencePiece tokens; the same errors.
std::string tokenizer_model_of(const LoadedModel& model, const std::string& path = "");

}  // namespace fathom
