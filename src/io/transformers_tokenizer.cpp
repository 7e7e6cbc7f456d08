#include "src/io/transformers_tokenizer.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <sentencepiece_processor.h>

#include "kernels/error.h"
#include "src/io/bpe_tokenizer.h"
#include "src/io/byte_alphabet.h"
#include "src/io/sentencepiece_seal.h"
#include "src/io/tokenizer.h"

namespace fathom {

namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kEnd = "<|endoftext|>";
constexpr const char* kLineEnd = "\n";          // a token of its own in the models that we train
constexpr const char* kSpace = "\xe2\x96\x81";  // U+2581, which stands for a space in SentencePiece's pieces

// A token that is found before anything else is done with the text.
Json added(std::int64_t id, const std::string& content, bool special) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", special}};
}

std::map<std::string, std::string> files(Json added_tokens, const Json& normalizer, const Json& pre_tokenizer,
                                         const Json& decoder, Json model) {
  model["type"] = "BPE";
  model["dropout"] = nullptr;
  model["continuing_subword_prefix"] = nullptr;
  model["end_of_word_suffix"] = nullptr;
  const Json tokenizer = {{"version", "1.0"},          {"truncation", nullptr},
                          {"padding", nullptr},        {"added_tokens", std::move(added_tokens)},
                          {"normalizer", normalizer},  {"pre_tokenizer", pre_tokenizer},
                          {"post_processor", nullptr}, {"decoder", decoder},
                          {"model", std::move(model)}};
  const Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"clean_up_tokenization_spaces", false},
                       {"eos_token", kEnd}};
  return {{"tokenizer.json", tokenizer.dump() + "\n"}, {"tokenizer_config.json", config.dump(2) + "\n"}};
}

// SentencePiece merges the pair whose piece has the best score; byte-level BPE has a list of pairs, best
// first. A piece of n characters can come of n - 1 pairs, of which those count whose halves are pieces
// themselves.
Json merges_of(const sentencepiece::SentencePieceProcessor& model) {
  struct Merge {
    float score;
    int id;
    std::string left, right;
  };
  const auto is_mergeable = [&](const std::string& piece) {
    const int id = model.PieceToId(piece);
    return !model.IsUnknown(id) && !model.IsControl(id) && !model.IsByte(id) && piece != kLineEnd;
  };
  std::vector<Merge> merges;
  for (int id = 0; id < model.GetPieceSize(); ++id) {
    const std::string& piece = model.IdToPiece(id);
    if (!is_mergeable(piece)) continue;
    for (std::size_t cut = 1; cut < piece.size(); ++cut) {
      if ((static_cast<unsigned char>(piece[cut]) & 0xc0) == 0x80) continue;  // within a character
      const std::string left = piece.substr(0, cut), right = piece.substr(cut);
      if (is_mergeable(left) && is_mergeable(right)) merges.push_back({model.GetScore(id), id, left, right});
    }
  }
  std::stable_sort(merges.begin(), merges.end(), [](const Merge& a, const Merge& b) {
    return std::pair(-a.score, a.id) < std::pair(-b.score, b.id);
  });
  Json list = Json::array();
  for (const Merge& m : merges) list.push_back({m.left, m.right});
  return list;
}

}  // namespace

std::map<std::string, std::string> transformers_byte_tokenizer() {
  Json vocabulary = Json::object();
  for (int byte = 0; byte < 256; ++byte) vocabulary[byte_character(static_cast<unsigned char>(byte))] = byte;
  const Json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", false}, {"use_regex", false}};
  return files({added(ByteTokenizer::kEndOfDocument, kEnd, true)}, nullptr, byte_level, byte_level,
               {{"unk_token", nullptr},
                {"fuse_unk", false},
                {"byte_fallback", false},
                {"vocab", vocabulary},
                {"merges", Json::array()}});
}

std::map<std::string, std::string> transformers_sentencepiece(std::string_view model,
                                                              const std::string& origin) {
  sentencepiece::SentencePieceProcessor pieces;
  if (!pieces.LoadFromSerializedProto(model).ok()) {
    throw UserError(fmt::format("{} is no SentencePiece model, or damaged.", origin));
  }
  std::map<std::string, std::string> all = {{"tokenizer.model", std::string(model)}};
  if (check_seal(model) != Seal::Valid) return all;
  Json vocabulary = Json::object();
  for (int id = 0; id < pieces.GetPieceSize(); ++id) vocabulary[pieces.IdToPiece(id)] = id;
  const Json tokens = {added(pieces.unk_id(), pieces.IdToPiece(pieces.unk_id()), true),
                       added(pieces.eos_id(), kEnd, true),
                       added(pieces.PieceToId(kLineEnd), kLineEnd, false)};
  const auto replace = [](const char* from, const char* to) {
    return Json{{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}};
  };
  const Json decoder = {{"type", "Sequence"},
                        {"decoders", {replace(kSpace, " "), {{"type", "ByteFallback"}}, {{"type", "Fuse"}}}}};
  all.merge(files(tokens, replace(" ", kSpace), nullptr, decoder,
                  {{"unk_token", pieces.IdToPiece(pieces.unk_id())},
                   {"fuse_unk", true},
                   {"byte_fallback", true},
                   {"vocab", vocabulary},
                   {"merges", merges_of(pieces)}}));
  return all;
}

std::map<std::string, std::string> transformers_bpe(const std::string& json, const std::string& origin) {
  const std::unique_ptr<Tokenizer> tokenizer = make_bpe_tokenizer(json, origin);
  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"}, {"clean_up_tokenization_spaces", false}};
  const auto name = [&](const char* key, std::int32_t id) {
    if (id >= 0) config[key] = tokenizer->piece(id);
  };
  name("bos_token", tokenizer->bos());
  name("eos_token", tokenizer->end_of_document());
  return {{"tokenizer.json", json}, {"tokenizer_config.json", config.dump(2) + "\n"}};
}

}  // namespace fathom
