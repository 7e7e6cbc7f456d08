#include "src/io/transformers_tokenizer.h"

#include <cstdint>

#include <nlohmann/json.hpp>

#include "src/io/tokenizer.h"

namespace fathom {

namespace {

using Json = nlohmann::ordered_json;

constexpr const char* kEnd = "<|endoftext|>";

std::string utf8(std::uint32_t point) {  // of two bytes at most
  if (point < 0x80) return {static_cast<char>(point)};
  return {static_cast<char>(0xc0 | (point >> 6)), static_cast<char>(0x80 | (point & 0x3f))};
}

// Byte-level BPE writes a byte as a character that can be seen (Radford et al. 2019): those of Latin-1 that
// can are themselves, the others follow from U+0100 on.
std::string shown(int byte, std::uint32_t& next) {
  const bool visible = (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
  return utf8(visible ? static_cast<std::uint32_t>(byte) : next++);
}

}  // namespace

std::map<std::string, std::string> transformers_byte_tokenizer() {
  Json vocabulary = Json::object();
  std::uint32_t next = 0x100;
  for (int byte = 0; byte < 256; ++byte) vocabulary[shown(byte, next)] = byte;
  const Json byte_level = {
      {"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", false}, {"use_regex", false}};
  const Json end = {{"id", ByteTokenizer::kEndOfDocument},
                    {"content", kEnd},
                    {"single_word", false},
                    {"lstrip", false},
                    {"rstrip", false},
                    {"normalized", false},
                    {"special", true}};
  const Json tokenizer = {{"version", "1.0"},
                          {"truncation", nullptr},
                          {"padding", nullptr},
                          {"added_tokens", {end}},
                          {"normalizer", nullptr},
                          {"pre_tokenizer", byte_level},
                          {"post_processor", nullptr},
                          {"decoder", byte_level},
                          {"model",
                           {{"type", "BPE"},
                            {"dropout", nullptr},
                            {"unk_token", nullptr},
                            {"continuing_subword_prefix", nullptr},
                            {"end_of_word_suffix", nullptr},
                            {"fuse_unk", false},
                            {"byte_fallback", false},
                            {"vocab", vocabulary},
                            {"merges", Json::array()}}}};
  const Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                       {"clean_up_tokenization_spaces", false},
                       {"eos_token", kEnd}};
  return {{"tokenizer.json", tokenizer.dump() + "\n"}, {"tokenizer_config.json", config.dump(2) + "\n"}};
}

}  // namespace fathom
