#include "src/io/tokenizer_json.h"

#include <algorithm>
#include <optional>
#include <set>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "kernels/error.h"
#include "src/io/byte_alphabet.h"
#include "src/io/tokenizer.h"

namespace fathom {

namespace {

using Json = nlohmann::json;

constexpr std::size_t kLargest = std::size_t{1} << 28;  // bytes; those of 250,000 tokens have a tenth of it
constexpr std::int64_t kMostHoles = 65536;              // ids without a token

const Json kNull = nullptr;

const Json& at(const Json& object, const char* key) {
  if (!object.is_object()) return kNull;
  const auto found = object.find(key);
  return found == object.end() ? kNull : *found;
}

// Of what is no text: none.
std::string text_of(const Json& value) {
  return value.is_string() ? value.get<std::string>() : std::string();
}

std::string type_of(const Json& object) { return text_of(at(object, "type")); }

// As errors quote it.
std::string shown(const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  constexpr std::size_t kLong = 160;
  if (text.size() > kLong) text = text.substr(0, kLong) + "...";
  return text;
}

class Reader {
 public:
  Reader(std::string_view text, const std::string& origin) : origin_(origin) {
    if (text.size() > kLargest) fail(fmt::format("it has {} bytes", text.size()));
    json_ = Json::parse(text, nullptr, false);
    if (!json_.is_object()) fail("it is no JSON object, or is cut off");
  }

  TokenizerJson read() {
    const Json& model = at(json_, "model");
    // The oldest files, GPT-2's own, do not say the type.
    const bool is_bpe =
        type_of(model) == "BPE" || (at(model, "type").is_null() && at(model, "merges").is_array());
    if (!is_bpe) fail(fmt::format("its model is {}, not BPE", shown(at(model, "type"))));
    require_absent(model, {"continuing_subword_prefix", "end_of_word_suffix", "dropout"});
    read_normalizer(at(json_, "normalizer"));
    read_pre_tokenizer(at(json_, "pre_tokenizer"));
    if (!is_byte_level_)
      fail("it has no ByteLevel in its pre_tokenizer, so its tokens are not made of bytes");
    read_decoder(at(json_, "decoder"));
    out_.ignore_merges = flag(model, "ignore_merges", false);
    read_vocabulary(at(model, "vocab"));
    read_merges(at(model, "merges"));
    read_added(at(json_, "added_tokens"));
    lay_out();
    read_post_processor(at(json_, "post_processor"));
    return std::move(out_);
  }

 private:
  [[noreturn]] void fail(const std::string& why) const {
    throw UserError(fmt::format("{} cannot be used as a tokenizer: {}.", origin_, why),
                    "Fathom reads byte-level BPE, as GPT-2, Llama 3 and Qwen3 have it (docs/formats.md).");
  }

  bool flag(const Json& object, const char* key, bool otherwise) const {
    const Json& value = at(object, key);
    if (value.is_null()) return otherwise;
    if (!value.is_boolean()) fail(fmt::format("{} is {}, not true or false", key, shown(value)));
    return value.get<bool>();
  }

  void require_absent(const Json& object, std::initializer_list<const char*> keys) const {
    for (const char* key : keys) {
      const Json& value = at(object, key);
      const bool is_nothing = value.is_null() || (value.is_string() && text_of(value).empty()) ||
                              (value.is_number() && value == 0.0);
      if (!is_nothing) fail(fmt::format("it has a {} of {}", key, shown(value)));
    }
  }

  // The parts of a Sequence under `key`, or `step` as its only part; no part: null.
  std::vector<const Json*> parts_of(const Json& step, const char* key) const {
    if (step.is_null()) return {};
    if (type_of(step) != "Sequence") return {&step};
    const Json& list = at(step, key);
    if (!list.is_array()) fail(fmt::format("it has a Sequence without {}", key));
    std::vector<const Json*> parts;
    for (const Json& part : list) parts.push_back(&part);
    return parts;
  }

  void read_normalizer(const Json& normalizer) {
    for (const Json* part : parts_of(normalizer, "normalizers")) {
      if (type_of(*part) != "NFC") fail(fmt::format("its normalizer {} is not NFC", shown(*part)));
      out_.normalizes = true;
    }
  }

  void read_pre_tokenizer(const Json& pre_tokenizer) {
    for (const Json* part : parts_of(pre_tokenizer, "pretokenizers")) {
      const std::string type = type_of(*part);
      if (is_byte_level_) fail(fmt::format("its pre_tokenizer has {} behind ByteLevel", shown(*part)));
      if (type == "ByteLevel") {
        is_byte_level_ = true;
        if (flag(*part, "add_prefix_space", true)) out_.pre_tokenizer.add_prefix_space();
        if (flag(*part, "use_regex", true)) add_split(kByteLevelPattern);
      } else if (type == "Split") {
        read_split(*part);
      } else if (type == "Digits") {
        add_split(flag(*part, "individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)");
      } else {
        fail(fmt::format("its pre_tokenizer has {}", shown(*part)));
      }
    }
  }

  void add_split(std::string_view pattern) {
    out_.pre_tokenizer.add_split(translate_pattern(pattern, origin_), origin_);
  }

  void read_split(const Json& split) {
    const Json &regex = at(at(split, "pattern"), "Regex"), &literal = at(at(split, "pattern"), "String");
    if (at(split, "behavior") != "Isolated") {
      fail(fmt::format("it has a Split of behavior {}, not Isolated", shown(at(split, "behavior"))));
    }
    // Matches and what lies between them are pieces alike, so that "invert" changes nothing.
    if (regex.is_string()) {
      add_split(regex.get_ref<const std::string&>());
    } else if (literal.is_string()) {
      out_.pre_tokenizer.add_split(literal_pattern(literal.get_ref<const std::string&>()), origin_);
    } else {
      fail(fmt::format("it has a Split by {}", shown(at(split, "pattern"))));
    }
  }

  void read_decoder(const Json& decoder) const {
    for (const Json* part : parts_of(decoder, "decoders")) {
      if (type_of(*part) != "ByteLevel") fail(fmt::format("its decoder has {}", shown(*part)));
    }
  }

  std::int32_t id_of(const Json& value, const std::string& token) const {
    constexpr std::int64_t kMost = std::int64_t{1} << 30;
    if (!value.is_number_integer() || value < 0 || value > kMost) {
      fail(fmt::format("the token {} has {} for an id", shown(token), shown(value)));
    }
    return value.get<std::int32_t>();
  }

  void read_vocabulary(const Json& vocabulary) {
    if (!vocabulary.is_object()) fail("it has no vocab");
    for (const auto& [token, id] : vocabulary.items()) ids_[token] = id_of(id, token);
    out_.byte_ids.fill(-1);
    for (int byte = 0; byte < 256; ++byte) {
      const auto found = ids_.find(byte_character(static_cast<unsigned char>(byte)));
      if (found == ids_.end()) {
        fail(fmt::format("it has no token for the byte {}, so it cannot write every text", byte));
      }
      out_.byte_ids[static_cast<std::size_t>(byte)] = found->second;
    }
  }

  // "left right", or ["left", "right"].
  void read_merges(const Json& merges) {
    if (!merges.is_array()) fail("it has no merges");
    for (const Json& merge : merges) {
      std::optional<std::pair<std::string, std::string>> pair;
      if (merge.is_string()) {
        const std::string& text = merge.get_ref<const std::string&>();
        const std::size_t space = text.find(' ');
        if (space != text.npos && text.find(' ', space + 1) == text.npos) {
          pair.emplace(text.substr(0, space), text.substr(space + 1));
        }
      } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
        pair.emplace(merge[0].get<std::string>(), merge[1].get<std::string>());
      }
      if (!pair) fail(fmt::format("its merge {} is no pair of tokens", shown(merge)));
      const auto id = [&](const std::string& token) {
        const auto found = ids_.find(token);
        if (found == ids_.end()) {
          fail(fmt::format("its merge {} has a token {}, which is not in its vocab", shown(merge),
                           shown(token)));
        }
        return found->second;
      };
      out_.merges.add(id(pair->first), id(pair->second), id(pair->first + pair->second));
    }
  }

  void read_added(const Json& added) {
    if (added.is_null()) return;
    if (!added.is_array()) fail(fmt::format("its added_tokens are {}", shown(added)));
    for (const Json& token : added) {
      const Json& content = at(token, "content");
      if (text_of(content).empty()) fail(fmt::format("its added token {} has no content", shown(token)));
      for (const char* key : {"single_word", "lstrip", "rstrip"}) {
        if (flag(token, key, false)) fail(fmt::format("its added token {} has {}", shown(content), key));
      }
      AddedToken one{id_of(at(token, "id"), content), content.get<std::string>(),
                     flag(token, "special", false), false};
      one.normalized = flag(token, "normalized", !one.special);
      if (const auto found = ids_.find(one.content); found != ids_.end() && found->second != one.id) {
        fail(fmt::format("its added token {} has the id {}, and {} in its vocab", shown(content), one.id,
                         found->second));
      }
      out_.added.push_back(std::move(one));
    }
  }

  // The text of every id.
  void lay_out() {
    std::int64_t size = 0;
    for (const auto& [token, id] : ids_) size = std::max<std::int64_t>(size, id + 1);
    for (const AddedToken& token : out_.added) size = std::max<std::int64_t>(size, token.id + 1);
    const auto tokens = static_cast<std::int64_t>(ids_.size() + out_.added.size());
    if (size > tokens + kMostHoles) fail(fmt::format("it has {} tokens, and ids up to {}", tokens, size - 1));
    out_.texts.resize(static_cast<std::size_t>(size));
    std::vector<const std::string*> owner(out_.texts.size());
    const auto own = [&](std::int32_t id, const std::string& token) {
      const std::string*& name = owner[static_cast<std::size_t>(id)];
      if (name != nullptr && *name != token) {
        fail(fmt::format("the tokens {} and {} have the same id, {}", shown(*name), shown(token), id));
      }
      name = &token;
    };
    for (const AddedToken& token : out_.added) own(token.id, token.content);
    for (const auto& [token, id] : ids_) {
      own(id, token);
      // A token with other characters than bytes' is never made of text, but may be in a vocabulary.
      std::optional<std::string> bytes = bytes_of_characters(token);
      out_.texts[static_cast<std::size_t>(id)] = bytes ? *bytes : token;
      if (bytes) out_.words.emplace(std::move(*bytes), id);
    }
    for (const AddedToken& token : out_.added) {
      out_.texts[static_cast<std::size_t>(token.id)] = token.special ? std::string() : token.content;
    }
  }

  // What goes before a text. What would go anywhere else has no place in a text that goes on.
  void read_post_processor(const Json& post_processor) {
    for (const Json* part : parts_of(post_processor, "processors")) {
      const std::string type = type_of(*part);
      if (type == "ByteLevel") continue;  // moves places in the text alone
      if (type != "TemplateProcessing") fail(fmt::format("its post_processor has {}", shown(*part)));
      const Json& single = at(*part, "single");
      if (!single.is_array() || single.empty() || single.size() > 2 || !single.back().contains("Sequence") ||
          out_.bos >= 0) {
        fail(fmt::format("its post_processor has the template {}, not one token before the text",
                         shown(single)));
      }
      if (single.size() == 1) continue;
      const Json& name = at(at(single[0], "SpecialToken"), "id");
      const Json& ids =
          at(at(at(*part, "special_tokens"), name.is_string() ? name.get<std::string>().c_str() : ""), "ids");
      const std::int64_t size = static_cast<std::int64_t>(out_.texts.size());
      if (!ids.is_array() || ids.size() != 1 || !ids[0].is_number_integer() || ids[0] < 0 || ids[0] >= size) {
        fail(fmt::format("its post_processor puts {} before a text, which is not one of its tokens",
                         shown(single[0])));
      }
      out_.bos = ids[0].get<std::int32_t>();
    }
  }

  const std::string& origin_;
  Json json_;
  std::unordered_map<std::string, std::int32_t> ids_;  // of the vocabulary, as it writes them
  bool is_byte_level_ = false;
  TokenizerJson out_;
};

}  // namespace

TokenizerJson parse_tokenizer_json(std::string_view text, const std::string& origin) {
  return Reader(text, origin).read();
}

}  // namespace fathom
