#include "src/io/bpe_tokenizer.h"

#include <algorithm>
#include <array>
#include <utility>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/io/checksum.h"
#include "src/io/tokenizer_json.h"
#include "src/io/utf8.h"
#include "src/io/word_cache.h"

namespace fathom {

namespace {

// GPT-2's and Qwen's; Llama 3's; those of older vocabularies; DeepSeek's.
constexpr std::array<std::string_view, 5> kEnds = {"<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>",
                                                   "<\xef\xbd\x9c"
                                                   "end\xe2\x96\x81of\xe2\x96\x81sentence\xef\xbd\x9c>"};

// Tokens that are looked for in a text before anything else is done with it: the leftmost, of those the
// longest.
class Finder {
 public:
  void add(const AddedToken& token) {
    std::vector<AddedToken>& same = by_first_[static_cast<unsigned char>(token.content[0])];
    same.push_back(token);
    std::stable_sort(same.begin(), same.end(), [](const AddedToken& a, const AddedToken& b) {
      return a.content.size() > b.content.size();
    });
  }

  /// Calls `token(id)` and `between(text)` in order.
  template <typename Token, typename Between>
  void split(std::string_view text, Token&& token, Between&& between) const {
    std::size_t done = 0;
    for (std::size_t i = 0; i < text.size();) {
      const AddedToken* found = at(text.substr(i));
      if (found == nullptr) {
        ++i;
        continue;
      }
      if (i > done) between(text.substr(done, i - done));
      token(found->id);
      done = i += found->content.size();
    }
    if (done < text.size()) between(text.substr(done));
  }

 private:
  const AddedToken* at(std::string_view text) const {
    for (const AddedToken& token : by_first_[static_cast<unsigned char>(text[0])]) {
      if (text.starts_with(token.content)) return &token;
    }
    return nullptr;
  }

  std::array<std::vector<AddedToken>, 256> by_first_;
};

class BpeTokenizer final : public Tokenizer {
 public:
  BpeTokenizer(std::string_view json, const std::string& origin)
      : hash_(hash_hex(json)), json_(parse_tokenizer_json(json, origin)) {
    for (const AddedToken& token : json_.added) {
      (token.normalized ? later_ : first_).add(token);
      if (token.special) control_.push_back(token);
    }
    for (const std::string_view name : kEnds) {
      for (const AddedToken& token : control_) {
        if (end_ < 0 && token.content == name) end_ = token.id;
      }
    }
  }

  std::vector<std::int32_t> encode(std::string_view text) const override {
    std::vector<std::int32_t> ids;
    ids.reserve(text.size() / 3 + 1);
    const auto token = [&](std::int32_t id) { ids.push_back(id); };
    first_.split(text, token, [&](std::string_view between) {
      later_.split(between, token, [&](std::string_view rest) { encode_plain(rest, ids); });
    });
    return ids;
  }

  std::string decode(std::span<const std::int32_t> ids) const override {
    std::string text;
    for (const std::int32_t id : ids) {
      check(id);
      text += json_.texts[static_cast<std::size_t>(id)];
    }
    return text;
  }

  std::int64_t vocab_size() const override { return static_cast<std::int64_t>(json_.texts.size()); }
  std::string hash() const override { return hash_; }
  std::string kind() const override { return "bpe"; }
  std::int32_t end_of_document() const override { return end_; }
  std::int32_t bos() const override { return json_.bos; }
  bool starts_with_bos() const override { return json_.bos >= 0; }
  std::string piece(std::int32_t id) const override {
    check(id);
    for (const AddedToken& token : control_) {
      if (token.id == id) return token.content;
    }
    return escape_text(json_.texts[static_cast<std::size_t>(id)]);
  }

 private:
  void check(std::int32_t id) const {
    if (id >= 0 && id < vocab_size()) return;
    throw UserError(
        fmt::format("the token id {} is outside the tokenizer's vocabulary [0, {}).", id, vocab_size()));
  }

  void encode_plain(std::string_view text, std::vector<std::int32_t>& ids) const {
    while (!text.empty()) {
      const std::size_t valid = utf8_prefix(text);
      json_.pre_tokenizer.split(text.substr(0, valid), [&](std::string_view word) {
        cache_.append(word, ids, [this](std::string_view one, std::vector<std::int32_t>& out) {
          encode_word(one, out);
        });
      });
      text.remove_prefix(valid);
      if (text.empty()) return;
      ids.push_back(json_.byte_ids[static_cast<unsigned char>(text[0])]);
      text.remove_prefix(1);
    }
  }

  void encode_word(std::string_view word, std::vector<std::int32_t>& ids) const {
    if (json_.ignore_merges) {
      const auto found = json_.words.find(std::string(word));
      if (found != json_.words.end()) {
        ids.push_back(found->second);
        return;
      }
    }
    std::vector<std::int32_t> bytes(word.size());
    for (std::size_t i = 0; i < word.size(); ++i) {
      bytes[i] = json_.byte_ids[static_cast<unsigned char>(word[i])];
    }
    json_.merges.apply(bytes);
    ids.insert(ids.end(), bytes.begin(), bytes.end());
  }

  std::string hash_;
  TokenizerJson json_;
  Finder first_, later_;
  std::vector<AddedToken> control_;
  std::int32_t end_ = -1;
  WordCache cache_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_bpe_tokenizer(std::string_view json, const std::string& origin) {
  return std::make_unique<BpeTokenizer>(json, origin);
}

}  // namespace fathom
