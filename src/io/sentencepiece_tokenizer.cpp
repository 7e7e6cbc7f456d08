#include "src/io/sentencepiece_tokenizer.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <utility>

#include <fmt/format.h>
#include <sentencepiece_processor.h>

#include "kernels/error.h"
#include "src/io/atomic_file.h"
#include "src/io/checksum.h"
#include "src/io/sentencepiece_seal.h"
#include "src/io/utf8.h"
#include "src/io/word_cache.h"

namespace fathom {

namespace {

constexpr std::string_view kSpace = "\xE2\x96\x81";  // U+2581, which SentencePiece writes for a space

std::string replace_all(std::string text, std::string_view from, std::string_view to) {
  for (std::size_t at = 0; (at = text.find(from, at)) != std::string::npos; at += to.size()) {
    text.replace(at, from.size(), to);
  }
  return text;
}

// Fields of the model's protobuf message that the library reads and does not show.
constexpr std::uint64_t kDenormalizer = 5;  // of the model
constexpr std::uint64_t kCharacterMap = 2;  // of a normalizer

std::uint64_t take_varint(std::string_view& message) {
  std::uint64_t value = 0;
  for (int shift = 0; !message.empty() && shift < 64; shift += 7) {
    const auto byte = static_cast<unsigned char>(message[0]);
    message.remove_prefix(1);
    value |= std::uint64_t{byte & 0x7fU} << shift;
    if (byte < 0x80) break;
  }
  return value;
}

// The bytes of the last such field of a message that the library could read; empty when there is none.
std::string_view field_of(std::string_view message, std::uint64_t number) {
  std::string_view found;
  while (!message.empty()) {
    const std::uint64_t key = take_varint(message);
    std::uint64_t size = 0;
    switch (key & 7) {
      case 0:
        take_varint(message);
        break;
      case 1:
        size = 8;
        break;
      case 2:
        size = take_varint(message);
        break;
      case 5:
        size = 4;
        break;
      default:  // groups, which the model's message does not have
        return found;
    }
    const std::string_view value = message.substr(0, size);
    message.remove_prefix(value.size());
    if (key == (number << 3 | 2)) found = value;
  }
  return found;
}

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(std::string_view model, const std::string& origin) : hash_(hash_hex(model)) {
    const auto fail = [&](const std::string& why, const std::string& hint) {
      throw UserError(fmt::format("{} cannot be used as a tokenizer: {}.", origin, why), hint);
    };
    if (model.empty()) fail("it is empty", "Make one with fathom tokenizer train.");
    if (check_seal(model) == Seal::Broken) {
      fail("it is damaged, its checksum does not fit", "Copy it again or train it again.");
    }
    const auto status = processor_.LoadFromSerializedProto(model);
    if (!status.ok()) {
      fail(fmt::format("it is not a valid SentencePiece model ({})", status.message()),
           "Make one with fathom tokenizer train, or give \"bytes\".");
    }
    if (processor_.eos_id() < 0 || processor_.eos_id() >= processor_.GetPieceSize()) {
      fail("it has no end-of-sentence token, which has to end documents", "Train it with an eos token.");
    }
    read_pieces();
    rewrites_ = !field_of(field_of(model, kDenormalizer), kCharacterMap).empty();
    const std::string probe = "  a  b\n\n c\xE2\x96\x81 \t\xC3\xA9 x\n";
    lossless_ = lossless_ && decode(encode(probe)) == probe;
  }

  std::vector<std::int32_t> encode(std::string_view text) const override {
    std::vector<std::int32_t> ids;
    if (!lossless_) {
      encode_with_library(text, ids);
      return ids;
    }
    ids.reserve(text.size() / 3 + 1);
    // U+2581 stands for the space inside the library, and invalid bytes become U+FFFD there: both go as
    // bytes.
    while (!text.empty()) {
      const std::size_t valid = utf8_prefix(text.substr(0, text.find(kSpace)));
      encode_valid(text.substr(0, valid), ids);
      text.remove_prefix(valid);
      const std::size_t raw = text.empty() ? 0 : text.substr(0, kSpace.size()) == kSpace ? kSpace.size() : 1;
      for (std::size_t i = 0; i < raw; ++i) ids.push_back(byte_ids_[static_cast<unsigned char>(text[i])]);
      text.remove_prefix(raw);
    }
    return ids;
  }

  std::string decode(std::span<const std::int32_t> ids) const override {
    for (const std::int32_t id : ids) check(id);
    std::string text;
    if (lossless_) {
      for (const std::int32_t id : ids) text += texts_[static_cast<std::size_t>(id)];
      return text;
    }
    const auto status = processor_.Decode(std::vector<int>(ids.begin(), ids.end()), &text);
    if (!status.ok()) throw InternalError(fmt::format("[sentencepiece] decode: {}", status.message()));
    return text;
  }

  // The library makes characters of a run of bytes, and U+FFFD of bytes that are none: at the end of a run
  // that is still open for the bytes of a character that has begun.
  std::size_t unsettled(std::span<const std::int32_t> ids) const override {
    if (lossless_) return 0;
    if (rewrites_) return ids.size();
    constexpr std::size_t kLongest = 4;  // bytes of a character
    for (std::size_t back = 1; back < kLongest && back <= ids.size(); ++back) {
      const int byte = byte_of(ids[ids.size() - back]);
      if (byte < 0x80) return 0;
      if (byte < 0xc0) continue;  // not the first of its character
      const std::size_t length = byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : kLongest;
      return back < length ? back : 0;
    }
    return 0;
  }

  std::int64_t vocab_size() const override { return processor_.GetPieceSize(); }
  std::string hash() const override { return hash_; }
  std::string kind() const override { return "sentencepiece"; }
  std::int32_t end_of_document() const override { return processor_.eos_id(); }
  std::int32_t bos() const override { return processor_.bos_id(); }
  std::string piece(std::int32_t id) const override {
    check(id);
    if (processor_.IsControl(id) || processor_.IsUnknown(id) || processor_.IsByte(id))
      return processor_.IdToPiece(id);
    return escape_text(texts_[static_cast<std::size_t>(id)]);
  }

 private:
  void check(std::int32_t id) const {
    if (id < 0 || id >= processor_.GetPieceSize()) {
      throw UserError(fmt::format("the token id {} is outside the tokenizer's vocabulary [0, {}).", id,
                                  processor_.GetPieceSize()));
    }
  }

  // -1 for a token that is no byte.
  int byte_of(std::int32_t id) const {
    const std::string& text = texts_[static_cast<std::size_t>(id)];
    return processor_.IsByte(id) && !text.empty() ? static_cast<unsigned char>(text[0]) : -1;
  }

  // The text of every piece, and what the model allows: `lossless_` when every byte has a piece (what the
  // probe at the end of the constructor then confirms); `word_local_` when no piece crosses the start of a
  // run of spaces or a line end, so that words can be encoded one by one.
  void read_pieces() {
    byte_ids_.fill(-1);
    texts_.resize(static_cast<std::size_t>(processor_.GetPieceSize()));
    for (int id = 0; id < processor_.GetPieceSize(); ++id) {
      const std::string& piece = processor_.IdToPiece(id);
      std::string& text = texts_[static_cast<std::size_t>(id)];
      if (processor_.IsControl(id) || processor_.IsUnknown(id)) continue;
      if (processor_.IsByte(id)) {
        unsigned value = 256;
        if (piece.size() == 6) std::from_chars(piece.data() + 3, piece.data() + 5, value, 16);
        if (value > 255) continue;
        byte_ids_[value] = id;
        text = static_cast<char>(value);
        continue;
      }
      text = replace_all(piece, kSpace, " ");
      const std::size_t word = text.find_first_not_of(' ');
      if (word != std::string::npos && text.find(' ', word) != std::string::npos) word_local_ = false;
      if (text.size() > 1 && text.find('\n') != std::string::npos) word_local_ = false;
    }
    lossless_ = std::find(byte_ids_.begin(), byte_ids_.end(), -1) == byte_ids_.end();
  }

  void encode_with_library(std::string_view text, std::vector<std::int32_t>& ids) const {
    std::vector<int> out;
    const auto status = processor_.Encode(text, &out);
    if (!status.ok()) throw InternalError(fmt::format("[sentencepiece] encode: {}", status.message()));
    ids.insert(ids.end(), out.begin(), out.end());
  }

  void encode_valid(std::string_view text, std::vector<std::int32_t>& ids) const {
    if (!word_local_) {
      if (!text.empty()) encode_with_library(text, ids);
      return;
    }
    while (!text.empty()) {
      // A word is a run of spaces and what follows up to the next space or line end; a line end is one by
      // itself.
      std::size_t end = std::min(text.find_first_not_of(' '), text.size());
      if (end == 0 && text[0] == '\n') {
        end = 1;
      } else {
        end = std::min(text.find_first_of(" \n", end), text.size());
      }
      const std::string_view word = text.substr(0, end);
      text.remove_prefix(end);
      cache_.append(word, ids, [this](std::string_view one, std::vector<std::int32_t>& out) {
        encode_with_library(one, out);
      });
    }
  }

  sentencepiece::SentencePieceProcessor processor_;
  std::string hash_;
  WordCache cache_;
  std::vector<std::string> texts_;  // of each id; empty for control tokens
  std::array<std::int32_t, 256> byte_ids_{};
  bool lossless_ = true;
  bool rewrites_ = false;  // a decoded text as a whole
  bool word_local_ = true;
};

}  // namespace

std::unique_ptr<Tokenizer> make_sentencepiece(std::string_view model, const std::string& origin) {
  return std::make_unique<SentencePieceTokenizer>(model, origin);
}

bool is_sentencepiece_file(const std::string& path) {
  constexpr std::uintmax_t kLargest = std::uintmax_t{1}
                                      << 28;  // a model of a million pieces is a tenth of it
  std::error_code error;
  if (std::filesystem::file_size(path, error) > kLargest || error) return false;
  const std::string model = read_file(path, "tokenizer");
  if (check_seal(model) != Seal::Absent) return true;
  return sentencepiece::SentencePieceProcessor().LoadFromSerializedProto(model).ok();
}

}  // namespace fathom
