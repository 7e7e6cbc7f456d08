#include "src/io/transformers_tokenizer.h"

#include <array>

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "src/io/sentencepiece_tokenizer.h"
#include "src/io/synthetic_text.h"
#include "src/io/tokenizer.h"
#include "tests/io/model_fixture.h"

namespace fathom {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::Key;

/// What a tokenizer.json says to do with a text, step by step and slowly: added tokens, then in each part
/// between them the normalizer, characters, bytes for those that are no piece, and merges by rank, the
/// leftmost first.
class Interpreter {
 public:
  explicit Interpreter(const std::string& text) : file_(json::parse(text)) {
    int rank = 0;
    for (const auto& pair : file_["model"]["merges"]) ranks_[{pair[0], pair[1]}] = rank++;
  }

  std::vector<std::int32_t> encode(const std::string& text) const {
    std::vector<std::int32_t> ids;
    std::string part;
    for (const char c : text) {
      if (c != '\n') {
        part += c;
        continue;
      }
      add_part(part, ids);
      part.clear();
      ids.push_back(added("\n"));
    }
    add_part(part, ids);
    return ids;
  }

 private:
  std::int32_t added(const std::string& content) const {
    for (const auto& token : file_["added_tokens"]) {
      if (token["content"] == content) return token["id"];
    }
    ADD_FAILURE() << "no added token " << content;
    return -1;
  }

  void add_part(const std::string& part, std::vector<std::int32_t>& ids) const {
    std::vector<std::string> symbols;
    const auto& vocabulary = file_["model"]["vocab"];
    for (std::size_t i = 0; i < part.size();) {
      std::size_t end = i + 1;
      while (end < part.size() && (static_cast<unsigned char>(part[end]) & 0xc0) == 0x80) ++end;
      std::string character = part.substr(i, end - i);
      if (character == file_["normalizer"]["pattern"]["String"]) character = file_["normalizer"]["content"];
      if (vocabulary.contains(character)) {
        symbols.push_back(character);
      } else {
        for (const char c : character) {
          std::array<char, 8> name{};
          std::snprintf(name.data(), name.size(), "<0x%02X>", static_cast<unsigned char>(c));
          symbols.emplace_back(name.data());
        }
      }
      i = end;
    }
    while (merge_best(symbols)) {
    }
    for (const std::string& symbol : symbols) ids.push_back(vocabulary.at(symbol));
  }

  bool merge_best(std::vector<std::string>& symbols) const {
    int best = -1;
    std::size_t place = 0;
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto found = ranks_.find({symbols[i], symbols[i + 1]});
      if (found == ranks_.end() || (best >= 0 && found->second >= best)) continue;
      best = found->second, place = i;
    }
    if (best < 0) return false;
    symbols[place] += symbols[place + 1];
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(place) + 1);
    return true;
  }

  json file_;
  std::map<std::pair<std::string, std::string>, int> ranks_;
};

TEST(TransformersTokenizer, BytesAreIds) {
  const auto files = transformers_byte_tokenizer();
  EXPECT_THAT(files, ElementsAre(Key("tokenizer.json"), Key("tokenizer_config.json")));
  const json vocabulary = json::parse(files.at("tokenizer.json"))["model"]["vocab"];
  EXPECT_EQ(vocabulary.size(), 256U);
  EXPECT_EQ(vocabulary["A"], 65);
  EXPECT_EQ(vocabulary["\u0120"], 32);  // a space, as byte-level BPE shows it
  EXPECT_EQ(vocabulary["\u00e9"], 0xe9);
  EXPECT_EQ(vocabulary["\u0143"], 0xad);  // the last that cannot be seen
}

TEST(TransformersTokenizer, OurPiecesGiveTheSameIds) {
  const std::string& model = testing::small_model();
  const auto files = transformers_sentencepiece(model, "small");
  EXPECT_EQ(files.at("tokenizer.model"), model);
  const Interpreter theirs(files.at("tokenizer.json"));
  const auto ours = make_sentencepiece(model, "small");
  const std::string text = synthetic_text(3000, 9);
  std::vector<std::string> texts = {
      "", " ", "\n\n", "  two  spaces ", "caf\u00e9 \u2014 \U0001F600", "12345 aaaaaaaa abababab"};
  for (std::size_t i = 0; i + 300 <= text.size(); i += 300) texts.push_back(text.substr(i, 300));
  for (const std::string& t : texts) EXPECT_EQ(theirs.encode(t), ours->encode(t)) << t;
}

TEST(TransformersTokenizer, ModelsOfOthersAreCopiedOnly) {
  const std::string& model = testing::small_model();
  // Without Fathom's mark in front and its checksum behind it is anyone's.
  const std::string bare = model.substr(21, model.size() - 21 - 40);
  EXPECT_THAT(transformers_sentencepiece(bare, "bare"), ElementsAre(Key("tokenizer.model")));
  EXPECT_THROW(transformers_sentencepiece("no model", "none"), UserError);
}

}  // namespace
}  // namespace fathom
