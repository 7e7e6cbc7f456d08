#include "src/io/tokenizer.h"

#include <atomic>
#include <random>
#include <thread>
#include <utility>

#include <gtest/gtest.h>
#include <sentencepiece_processor.h>

#include "src/io/load_tokenizer.h"
#include "src/io/sentencepiece_seal.h"
#include "src/io/sentencepiece_tokenizer.h"
#include "tests/io/model_fixture.h"
#include "tests/io/temp.h"

namespace fathom {
namespace {

using testing::expect_user_error;
using testing::small_model;
using testing::TempFolder;
using testing::write_bytes;

// Text of every sort: words of the training text, odd white space, marks that SentencePiece uses inside, any
// character.
std::string random_text(std::mt19937& random) {
  static const std::vector<std::string> parts = {" ",
                                                 "  ",
                                                 "\n",
                                                 "\n\n\n",
                                                 "\t",
                                                 "\r\n",
                                                 "Mara",
                                                 " lives in ",
                                                 "the dogs run.",
                                                 "12345",
                                                 "\xE2\x96\x81",
                                                 "\xE2\x96\x85",
                                                 "<s>",
                                                 "</s>",
                                                 "<unk>",
                                                 "<0x41>",
                                                 "<|endoftext|>",
                                                 "\xF0\x9F\x98\x80",
                                                 "caf\xC3\xA9",
                                                 "((",
                                                 std::string("\0", 1),
                                                 "\x01",
                                                 "\xEF\xBB\xBF",
                                                 "\xCC\x81",
                                                 "\xC2\xA0",
                                                 "\xE3\x80\x80",
                                                 "\xEF\xBC\xA1"};
  std::string text;
  const std::size_t count = random() % 30;
  for (std::size_t i = 0; i < count; ++i) {
    if (random() % 4 != 0) {
      text += parts[random() % parts.size()];
      continue;
    }
    char32_t c = 0;
    do c = static_cast<char32_t>(random() % 0x110000);
    while (c >= 0xD800 && c < 0xE000);
    if (c < 0x80) {
      text += static_cast<char>(c);
    } else if (c < 0x800) {
      text += {static_cast<char>(0xC0 | (c >> 6)), static_cast<char>(0x80 | (c & 63))};
    } else if (c < 0x10000) {
      text += {static_cast<char>(0xE0 | (c >> 12)), static_cast<char>(0x80 | ((c >> 6) & 63)),
               static_cast<char>(0x80 | (c & 63))};
    } else {
      text += {static_cast<char>(0xF0 | (c >> 18)), static_cast<char>(0x80 | ((c >> 12) & 63)),
               static_cast<char>(0x80 | ((c >> 6) & 63)), static_cast<char>(0x80 | (c & 63))};
    }
  }
  return text;
}

std::string random_bytes(std::mt19937& random) {
  std::string bytes(random() % 40, '\0');
  for (char& c : bytes) c = static_cast<char>(random());
  return bytes;
}

void expect_round_trips(const Tokenizer& tokenizer) {
  std::mt19937 random(11);
  for (int i = 0; i < 3000; ++i) {
    const std::string text = i % 5 == 0 ? random_bytes(random) : random_text(random);
    const auto ids = tokenizer.encode(text);
    ASSERT_EQ(tokenizer.decode(ids), text) << escape_text(text);
    for (const std::int32_t id : ids) {
      ASSERT_GE(id, 0);
      ASSERT_LT(id, tokenizer.vocab_size());
      ASSERT_NE(id, tokenizer.end_of_document()) << "text must not be able to end a document";
    }
  }
}

// What the library says about the whole text at once.
std::vector<std::int32_t> encode_whole(const std::string& model, const std::string& text) {
  sentencepiece::SentencePieceProcessor processor;
  EXPECT_TRUE(processor.LoadFromSerializedProto(model).ok());
  std::vector<int> ids;
  EXPECT_TRUE(processor.Encode(text, &ids).ok());
  return {ids.begin(), ids.end()};
}

TEST(ByteTokenizer, EncodesBytes) {
  const ByteTokenizer bytes;
  EXPECT_EQ(bytes.vocab_size(), 257);
  EXPECT_EQ(bytes.end_of_document(), 256);
  EXPECT_EQ(bytes.encode("a\xFF"), (std::vector<std::int32_t>{97, 255}));
  EXPECT_EQ(bytes.decode(std::vector<std::int32_t>{97, 256, 98}), "ab");
  EXPECT_EQ(bytes.piece(10), "\\n");
  expect_round_trips(bytes);
  expect_user_error([&] { bytes.decode(std::vector<std::int32_t>{257}); }, {"257", "[0, 257)"});
  expect_user_error([&] { bytes.decode(std::vector<std::int32_t>{-1}); }, {"-1"});
}

TEST(SentencePiece, EveryTextComesBack) { expect_round_trips(*make_sentencepiece(small_model(), "small")); }

TEST(SentencePiece, LearnsTheText) {
  const auto tokenizer = make_sentencepiece(small_model(), "small");
  EXPECT_EQ(tokenizer->vocab_size(), 500);
  EXPECT_EQ(tokenizer->kind(), "sentencepiece");
  EXPECT_EQ(tokenizer->hash().size(), 32U);
  EXPECT_GE(tokenizer->end_of_document(), 0);
  EXPECT_EQ(tokenizer->bos(), -1);
  const std::string text = synthetic_document(9, 1);
  EXPECT_LT(tokenizer->encode(text).size(), text.size() / 2);
  EXPECT_EQ(tokenizer->encode("\n\n").size(), 2U);
  EXPECT_EQ(tokenizer->encode("77").size(), 2U) << "digits are split";
  EXPECT_TRUE(tokenizer->encode("").empty());
  EXPECT_EQ(tokenizer->decode(std::vector<std::int32_t>{tokenizer->end_of_document()}), "");
  expect_user_error([&] { tokenizer->decode(std::vector<std::int32_t>{500}); }, {"500", "[0, 500)"});
}

// Words are encoded one by one and remembered; the library itself, given the whole text, must say the same.
TEST(SentencePiece, WordByWordGivesTheSameIdsAsTheWholeText) {
  const auto tokenizer = make_sentencepiece(small_model(), "small");
  std::mt19937 random(5);
  for (int i = 0; i < 200; ++i) {
    std::string text = synthetic_document(2, static_cast<std::uint64_t>(i));
    for (char& c : text) {
      if (random() % 30 == 0) c = ' ';
    }
    const auto cold = make_sentencepiece(small_model(), "small")->encode(text);
    EXPECT_EQ(tokenizer->encode(text), cold);
    EXPECT_EQ(encode_whole(small_model(), text), cold);
  }
}

TEST(SentencePiece, ThreadsShareATokenizer) {
  const auto tokenizer = make_sentencepiece(small_model(), "small");
  const auto other = make_sentencepiece(testing::train_model(400), "other");
  const std::string text = synthetic_text(50000, 4);
  const auto expected = tokenizer->encode(text);
  const auto expected_other = other->encode(text);
  std::vector<std::thread> threads;
  threads.reserve(4);
  std::atomic<int> wrong{0};
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 5; ++i) {
        if (tokenizer->encode(text) != expected || other->encode(text) != expected_other) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(SentencePiece, TrainingIsReproducible) {
  EXPECT_EQ(testing::train_model(500), small_model());
  SentencePieceTraining settings;
  settings.vocab_size = 400;
  settings.sample_bytes = 3000;
  const auto train = [&](std::uint64_t seed) {
    std::uint64_t documents = 0;
    settings.seed = seed;
    return train_sentencepiece(
        [&](std::string& document) {
          document = synthetic_document(1, documents);
          return ++documents <= 300;
        },
        settings);
  };
  EXPECT_EQ(train(1), train(1));
  EXPECT_NE(train(1), train(2)) << "another sample of the lines";
}

TEST(SentencePiece, TrainingErrors) {
  const auto train = [](std::int64_t vocab, const std::string& text) {
    SentencePieceTraining settings;
    settings.vocab_size = vocab;
    bool given = false;
    train_sentencepiece(
        [&](std::string& document) {
          document = text;
          return !std::exchange(given, true);
        },
        settings);
  };
  expect_user_error([&] { train(1000, ""); }, {"text is empty"});
  expect_user_error([&] { train(1000, "\n\n\n"); }, {"text is empty"});
  expect_user_error([&] { train(100, "text"); }, {"100", "260"});
  expect_user_error([&] { train(5000, "a few words only"); }, {"5000", "smaller --vocab"});
  expect_user_error([&] { train(262, synthetic_text(20000, 1)); },
                    {"262", "different characters", "larger --vocab"});
}

TEST(SentencePiece, ForeignAndDamagedModels) {
  const TempFolder folder;
  const std::string path = folder / "a.model";
  const auto load = [&] { load_tokenizer(path); };
  expect_user_error(load, {path, "No such file"});
  write_bytes(path, "");
  expect_user_error(load, {path, "empty"});
  write_bytes(path, "this is not a model");
  expect_user_error(load, {path, "SentencePiece"});
  write_bytes(path, "{\"model\": {}}");
  expect_user_error(load, {path, "BPE"});
  std::string bad = small_model();
  bad[bad.size() / 2] = static_cast<char>(bad[bad.size() / 2] ^ 4);
  write_bytes(path, bad);
  expect_user_error(load, {path, "damaged", "checksum"});
  write_bytes(path, small_model().substr(0, small_model().size() / 2));
  expect_user_error(load, {path, "damaged", "checksum"});
  write_bytes(path, small_model());
  EXPECT_EQ(load_tokenizer(path)->hash(), make_sentencepiece(small_model(), "x")->hash());
  EXPECT_EQ(load_tokenizer("bytes")->hash(), "bytes");
  EXPECT_EQ(check_seal(small_model()), Seal::Valid);
  EXPECT_EQ(check_seal("another"), Seal::Absent);
}

TEST(EscapeText, ShowsEverythingOnOneLine) {
  EXPECT_EQ(escape_text("a\n\t\"\\\x01\xC3\xA9\xFF"), "a\\n\\t\\\"\\\\\\x01\xC3\xA9\\xff");
}

}  // namespace
}  // namespace fathom
