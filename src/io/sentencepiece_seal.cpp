#include "src/io/sentencepiece_seal.h"

#include "src/io/checksum.h"

namespace fathom {

namespace {

// Protobuf: fields 2001 and 2002, length-delimited. SentencePiece's ModelProto leaves 200 and up to
// extensions.
constexpr std::string_view kMarkField = "\x8A\x7D\x12";  // 18 bytes follow
constexpr std::string_view kMark = "fathom-tokenizer-1";
constexpr std::string_view kChecksumField = "\x92\x7D\x25";  // 37 bytes follow
constexpr std::string_view kChecksumName = "xxh3:";
constexpr std::size_t kHashDigits = 32;
static_assert(kMark.size() == 0x12 && kChecksumName.size() + kHashDigits == 0x25);

std::string front() { return std::string(kMarkField) + std::string(kMark); }
std::string back(std::string_view before) {
  return std::string(kChecksumField) + std::string(kChecksumName) + hash_hex(before);
}

}  // namespace

std::string seal_model(std::string_view model) {
  std::string sealed = front() + std::string(model);
  sealed += back(sealed);
  return sealed;
}

Seal check_seal(std::string_view model) {
  // One of the two surviving is enough to know that the model was ours.
  const bool ours =
      model.find(kMark) != std::string_view::npos ||
      model.find(std::string(kChecksumField) + std::string(kChecksumName)) != std::string_view::npos;
  if (!ours) return Seal::Absent;
  const std::size_t tail = kChecksumField.size() + kChecksumName.size() + kHashDigits;
  if (model.size() < tail || model.substr(0, front().size()) != front()) return Seal::Broken;
  const std::string_view body = model.substr(0, model.size() - tail);
  return model.substr(body.size()) == back(body) ? Seal::Valid : Seal::Broken;
}

}  // namespace fathom
