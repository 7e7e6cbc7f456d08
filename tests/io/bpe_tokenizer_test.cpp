#include "src/io/bpe_tokenizer.h"

#include <thread>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "src/io/load_tokenizer.h"
#include "src/io/split_pattern.h"
#include "src/io/transformers_tokenizer.h"
#include "tests/io/mutate.h"
#include "tests/io/temp.h"

namespace fathom {
namespace {

using nlohmann::json;
using testing::expect_user_error;
using testing::Mutator;
using testing::read_bytes;

const json& cases() {  // of make_bpe.py
  static const json all = json::parse(read_bytes(FATHOM_SOURCE_DIR "/tests/golden/bpe.json"));
  return all;
}

json tokenizer_of_case(const std::string& name) {
  for (const json& c : cases()) {
    if (c["name"] == name) return c["tokenizer"];
  }
  ADD_FAILURE() << "no case " << name;
  return {};
}

std::unique_ptr<Tokenizer> made(const json& tokenizer) {
  return make_bpe_tokenizer(tokenizer.dump(), "t.json");
}

TEST(BpeTokenizer, IdsAreTheOnesOfHuggingFace) {
  ASSERT_EQ(cases().size(), 5U);
  for (const json& c : cases()) {
    const auto tokenizer = made(c["tokenizer"]);
    ASSERT_GT(c["texts"].size(), 40U);
    for (const json& t : c["texts"]) {
      EXPECT_EQ(json(tokenizer->encode(t["text"].get<std::string>())), t["ids"])
          << c["name"] << ": " << t["text"];
    }
  }
}

TEST(BpeTokenizer, TextComesBackAsItWas) {
  Mutator random(3);
  for (const char* name : {"gpt2", "llama3", "qwen", "digits"}) {
    const auto tokenizer = made(tokenizer_of_case(name));
    for (int i = 0; i < 300; ++i) {
      std::string text = random.mutate(
          "The sea, caf\xc3\xa9 \xe2\x80\x94 12 ships\n\n  \xf0\x9f\x98\x80 it's \xff\xc3 <too");
      for (int more = 0; more < i % 5; ++more) text = random.mutate(text);
      EXPECT_EQ(tokenizer->decode(tokenizer->encode(text)), text) << name;
    }
  }
  const auto spaced = made(tokenizer_of_case("prefix_space"));
  EXPECT_EQ(spaced->decode(spaced->encode("sea")), " sea");
}

TEST(BpeTokenizer, ABrokenByteIsATokenByItself) {
  const auto tokenizer = made(tokenizer_of_case("gpt2"));
  const auto joined = [&](std::initializer_list<std::string> parts) {
    std::vector<std::int32_t> ids;
    for (const std::string& part : parts) {
      const auto some = tokenizer->encode(part);
      ids.insert(ids.end(), some.begin(), some.end());
    }
    return ids;
  };
  EXPECT_EQ(tokenizer->encode("sea \xff ship\xe2\x82"), joined({"sea ", "\xff", " ship", "\xe2", "\x82"}));
  EXPECT_EQ(tokenizer->encode("\xff").size(), 1U);
  EXPECT_EQ(tokenizer->encode("\xed\xa0\x80").size(), 3U);  // half of a surrogate pair is no character
}

TEST(BpeTokenizer, WhatItSaysOfItself) {
  const json llama = tokenizer_of_case("llama3");
  const auto tokenizer = made(llama);
  EXPECT_EQ(tokenizer->kind(), "bpe");
  EXPECT_TRUE(tokenizer->starts_with_bos());
  EXPECT_EQ(tokenizer->piece(tokenizer->bos()), "<|begin_of_text|>");
  EXPECT_EQ(tokenizer->piece(tokenizer->end_of_document()), "<|end_of_text|>");
  EXPECT_EQ(tokenizer->decode(std::vector{tokenizer->bos(), tokenizer->end_of_document()}), "");
  EXPECT_EQ(tokenizer->vocab_size(), static_cast<std::int64_t>(llama["model"]["vocab"].size()) + 2);
  EXPECT_EQ(tokenizer->hash().size(), 32U);
  EXPECT_THROW(tokenizer->decode(std::vector<std::int32_t>{-1}), UserError);
  EXPECT_THROW(tokenizer->piece(static_cast<std::int32_t>(tokenizer->vocab_size())), UserError);
  const auto qwen = made(tokenizer_of_case("qwen"));
  EXPECT_FALSE(qwen->starts_with_bos());
  EXPECT_EQ(qwen->bos(), -1);
  json nameless = tokenizer_of_case("gpt2");
  nameless["added_tokens"][0]["content"] = "<|stop|>";
  EXPECT_EQ(made(nameless)->end_of_document(), -1);
}

TEST(BpeTokenizer, ThreadsShareIt) {
  const auto tokenizer = made(tokenizer_of_case("llama3"));
  const auto other = made(tokenizer_of_case("qwen"));
  const std::string text = "Mara's ship, 1984:\n\n  the LANTERN harbour\xe3\x80\x80x";
  const auto expected = tokenizer->encode(text), expected_other = other->encode(text);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int n = 0; n < 50; ++n) {
        EXPECT_EQ(tokenizer->encode(text), expected);
        EXPECT_EQ(other->encode(text), expected_other);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// A word of a megabyte takes no square of it, and a pattern no stack of it.
TEST(BpeTokenizer, LongWordsAreEncoded) {
  for (const char* name : {"gpt2", "llama3"}) {
    const auto tokenizer = made(tokenizer_of_case(name));
    for (const std::string& unit :
         {std::string("a"), std::string(" "), std::string("\n "), std::string("?")}) {
      std::string text;
      while (text.size() < std::size_t{1} << 20) text += unit;
      text += "x";
      EXPECT_EQ(tokenizer->decode(tokenizer->encode(text)), text) << name;
    }
  }
}

TEST(BpeTokenizer, OurOwnBytesAreRead) {
  const auto tokenizer = make_tokenizer(transformers_byte_tokenizer().at("tokenizer.json"), "bytes.json");
  const std::string text = "caf\xc3\xa9 \xff\n";
  EXPECT_EQ(tokenizer->encode(text), ByteTokenizer().encode(text));
  EXPECT_EQ(tokenizer->vocab_size(), 257);
  EXPECT_EQ(tokenizer->end_of_document(), ByteTokenizer::kEndOfDocument);
}

TEST(BpeTokenizer, ItsFileGoesBackAsItWas) {
  const std::string text = tokenizer_of_case("llama3").dump();
  const auto files = transformers_bpe(text, "t.json");
  EXPECT_EQ(files.at("tokenizer.json"), text);
  const json config = json::parse(files.at("tokenizer_config.json"));
  EXPECT_EQ(config["eos_token"], "<|end_of_text|>");
  EXPECT_EQ(config["bos_token"], "<|begin_of_text|>");
}

TEST(BpeTokenizer, WhatFathomHasNotIsNamed) {
  const json good = tokenizer_of_case("llama3");
  const auto refused = [&](const std::function<void(json&)>& change,
                           std::initializer_list<std::string> words) {
    json changed = good;
    change(changed);
    expect_user_error([&] { made(changed); }, words);
  };
  refused([](json& t) { t["model"]["type"] = "Unigram"; }, {"t.json", "Unigram"});
  refused([](json& t) { t["model"]["dropout"] = 0.1; }, {"dropout", "0.1"});
  refused([](json& t) { t["model"]["end_of_word_suffix"] = "</w>"; }, {"end_of_word_suffix", "</w>"});
  refused([](json& t) { t["model"]["ignore_merges"] = 1; }, {"ignore_merges"});
  refused([](json& t) { t["model"]["vocab"].erase("a"); }, {"no token for the byte 97"});
  refused([](json& t) { t["model"]["vocab"]["a"] = "x"; }, {"\"a\"", "id"});
  refused([](json& t) { t["model"]["vocab"]["a"] = -1; }, {"\"a\"", "-1"});
  refused([](json& t) { t["model"]["vocab"]["a"] = 1 << 29; }, {"ids up to"});
  refused([](json& t) { t["model"]["vocab"]["a"] = t["model"]["vocab"]["b"]; }, {"same id"});
  refused([](json& t) { t["model"]["merges"][3] = "a"; }, {"merge", "\"a\""});
  refused([](json& t) { t["model"]["merges"][3] = {"a", "b", "c"}; }, {"merge"});
  refused([](json& t) { t["model"]["merges"][3] = {"a", "zzz"}; }, {"merge", "zzz", "not in its vocab"});
  refused([](json& t) { t["model"].erase("merges"); }, {"no merges"});
  refused([](json& t) { t["normalizer"] = {{"type", "NFKC"}}; }, {"normalizer", "NFKC"});
  refused(
      [](json& t) {
        t["normalizer"] = {{"type", "Sequence"}, {"normalizers", {{{"type", "Lowercase"}}}}};
      },
      {"normalizer", "Lowercase"});
  refused([](json& t) { t["pre_tokenizer"] = {{"type", "Metaspace"}}; }, {"pre_tokenizer", "Metaspace"});
  refused([](json& t) { t["pre_tokenizer"] = nullptr; }, {"ByteLevel"});
  refused([](json& t) { t["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"; },
          {"Split", "Removed"});
  refused([](json& t) { t["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "\\w+"; },
          {"\\w+", "\\w"});
  refused([](json& t) { t["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(?:a"; },
          {"(?:a", "t.json"});
  refused([](json& t) { t["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "a*"; },
          {"a*", "no character"});
  refused([](json& t) { t["decoder"] = {{"type", "Fuse"}}; }, {"decoder", "Fuse"});
  refused([](json& t) { t["added_tokens"][0]["lstrip"] = true; }, {"<|end_of_text|>", "lstrip"});
  refused([](json& t) { t["added_tokens"][0]["content"] = ""; }, {"added token", "no content"});
  refused([](json& t) { t["added_tokens"][0]["content"] = "a"; }, {"added token", "\"a\"", "vocab"});
  refused(
      [](json& t) {
        t["post_processor"]["processors"][1]["single"].push_back({{"SpecialToken", {{"id", "x"}}}});
      },
      {"post_processor", "one token before"});
  refused([](json& t) { t["post_processor"]["processors"][1]["special_tokens"] = json::object(); },
          {"post_processor"});
  expect_user_error([] { make_bpe_tokenizer("{\"model\":", "t.json"); }, {"t.json", "no JSON"});
  expect_user_error([] { make_tokenizer("", "t.json"); }, {"t.json", "empty"});
}

TEST(BpeTokenizer, DamagedFilesAreReadOrRefused) {
  const std::string good = tokenizer_of_case("qwen").dump();
  Mutator random(11);
  std::int64_t refused = 0;
  const std::int64_t inputs = testing::fuzz_inputs(150);
  for (std::int64_t i = 0; i < inputs; ++i) {
    try {
      const auto tokenizer = make_bpe_tokenizer(random.mutate(good), "t.json");
      const auto ids = tokenizer->encode("The sea, caf\xc3\xa9 12\n");
      EXPECT_FALSE(ids.empty());
      tokenizer->decode(ids);
    } catch (const UserError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, inputs / 4);
}

TEST(SplitPattern, PiecesAreTheTextTogether) {
  const SplitPattern pattern(translate_pattern(R"(\s+(?!\S)|[^\s\p{L}-]+|(a|b)c?)", "p"), "p");
  const auto pieces = [&](std::string_view text) {
    std::vector<std::string> all;
    pattern.split(text, [&](std::string_view piece) { all.emplace_back(piece); });
    return all;
  };
  using Pieces = std::vector<std::string>;
  EXPECT_EQ(pieces(""), Pieces{});
  EXPECT_EQ(pieces("xyz"), Pieces{"xyz"});
  EXPECT_EQ(pieces("x  y..-acb"), (Pieces{"x", " ", " y", "..", "-", "ac", "b"}));
  EXPECT_EQ(pieces("x\u180e "), (Pieces{"x", "\u180e", " "}));  // which is no white space to Unicode
}

TEST(SplitPattern, WhatDiffersBetweenLibrariesIsRefused) {
  for (const char* pattern : {R"(\w)",   R"(\b)", R"(\d)",      R"(\1)",     ".",      "^a",      "a$",
                              "a?+",     "a++",   "a{1,2}+",    "a{2}?",     "a{,3}",  "a{",      "a**",
                              "(?<n>a)", "(?i)a", "(?>a)",      "[a[b]]",    "[a&&b]", R"([\S])", R"([])",
                              "[a",      "\\",    R"(\p{Han})", R"(\p{^L})", R"(\pL)", R"(\x41)", R"(\K)"}) {
    expect_user_error([&] { SplitPattern(translate_pattern(pattern, "p.json"), "p.json"); },
                      {"p.json", pattern});
  }
  // PCRE2's own words are none here.
  expect_user_error([] { SplitPattern(translate_pattern("(*UTF)a", "p.json"), "p.json"); },
                    {"p.json", "UTF"});
  EXPECT_EQ(translate_pattern(R"((a)\p{Lu}??[^\r\n]{1,3})", "p"), R"((?:a)\p{Lu}??[^\r\n]{1,3})");
}

// All ways to cut a text into runs of a are tried, as many as two to the power of its length.
TEST(SplitPattern, APatternThatNeverEndsIsAnError) {
  const SplitPattern pattern(translate_pattern("(a+)+(b|c)", "p.json"), "p.json");
  expect_user_error([&] { pattern.split(std::string(60, 'a'), [](std::string_view) {}); },
                    {"p.json", "60 bytes", "limit"});
}

}  // namespace
}  // namespace fathom
