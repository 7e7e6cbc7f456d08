// A checksum inside SentencePiece models that we train. The format is a protobuf message without one, so that
// a flipped bit would silently give another tokenizer; two fields with numbers that others ignore hold a mark
// (at the front) and the checksum (at the end).
#pragma once

#include <string>
#include <string_view>

namespace fathom {

/// `model` between its mark and its checksum.
std::string seal_model(std::string_view model);

enum class Seal {
  Absent,  // a model of another program
  Valid,
  Broken,  // ours, and damaged
};

Seal check_seal(std::string_view model);

}  // namespace fathom
