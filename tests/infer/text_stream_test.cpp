// Text as it comes, token by token, is the text of all tokens, and costs the same for each of them.
#include "infer/text_stream.h"

#include <functional>
#include <map>
#include <random>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>
#include <sentencepiece_trainer.h>

#include "src/io/bpe_tokenizer.h"
#include "src/io/sentencepiece_tokenizer.h"
#include "src/io/synthetic_text.h"
#include "tests/io/model_fixture.h"
#include "tests/io/temp.h"

namespace fathom {
namespace {

using Ids = std::vector<std::int32_t>;

class TextLines final : public sentencepiece::SentenceIterator {
 public:
  bool done() const override { return next_ == 300; }
  void Next() override { line_ = synthetic_document(4, ++next_); }
  const std::string& value() const override { return line_; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  std::uint64_t next_ = 0;
  std::string line_ = synthetic_document(4, 0);
};

// A model as others train it: its decoding is the library's, which looks at a token's neighbours.
std::unique_ptr<Tokenizer> made_by_others(std::map<std::string, std::string> options) {
  options.insert({{"model_type", "bpe"}, {"vocab_size", "450"}, {"minloglevel", "2"}, {"num_threads", "1"}});
  TextLines lines;
  std::string model;
  const auto status =
      sentencepiece::SentencePieceTrainer::Train({options.begin(), options.end()}, &lines, &model);
  EXPECT_TRUE(status.ok()) << status.message();
  return make_sentencepiece(model, "others.model");
}

struct Case {
  std::string name;
  std::unique_ptr<Tokenizer> tokenizer;
};

std::vector<Case> all_tokenizers() {
  std::vector<Case> cases;
  cases.push_back({"bytes", std::make_unique<ByteTokenizer>()});
  const auto golden = nlohmann::json::parse(testing::read_bytes(FATHOM_SOURCE_DIR "/tests/golden/bpe.json"));
  for (const auto& c : golden)
    cases.push_back({c["name"], make_bpe_tokenizer(c["tokenizer"].dump(), "t.json")});
  cases.push_back({"ours", make_sentencepiece(testing::small_model(), "small")});
  cases.push_back({"words", made_by_others({{"vocab_size", "200"}})});
  cases.push_back({"bytes for the rest", made_by_others({{"byte_fallback", "true"}})});
  cases.push_back(
      {"spaces kept", made_by_others({{"byte_fallback", "true"}, {"remove_extra_whitespaces", "false"}})});
  cases.push_back(
      {"no space in front", made_by_others({{"byte_fallback", "true"}, {"add_dummy_prefix", "false"}})});
  return cases;
}

// Some ids come often, so that runs of bytes, of spaces and of tokens without a text come up.
Ids random_ids(const Tokenizer& tokenizer, std::mt19937& random, std::size_t count) {
  const auto vocabulary = static_cast<std::uint32_t>(tokenizer.vocab_size());
  Ids often = tokenizer.encode(" a  caf\xC3\xA9 \xE2\x82\xAC\xF0\x9F\x98\x80 \xFF\n");
  for (std::int32_t id = 0; id < 8; ++id) often.push_back(id);
  if (tokenizer.kind() == "sentencepiece") {
    for (std::int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
      if (tokenizer.piece(id).starts_with("<0x") || tokenizer.piece(id) == " ") often.push_back(id);
    }
  }
  Ids ids;
  const std::uint32_t share = random() % 5;  // of those that come often, a text
  while (ids.size() < count) {
    ids.push_back(random() % 4 < share ? often[random() % often.size()]
                                       : static_cast<std::int32_t>(random() % vocabulary));
  }
  return ids;
}

TEST(TextStream, IsTheTextOfAllTokensAtEachToken) {
  for (const Case& c : all_tokenizers()) {
    SCOPED_TRACE(c.name);
    std::mt19937 random(7);
    for (int i = 0; i < 300; ++i) {
      const Ids ids = random_ids(*c.tokenizer, random, 1 + random() % 40);
      TextStream stream(*c.tokenizer, {});
      std::string given;
      for (std::size_t n = 1; n <= ids.size(); ++n) {
        given += stream.add(ids[n - 1]);
        const std::string text = c.tokenizer->decode(std::span(ids).first(n));
        ASSERT_EQ(stream.text(), text) << ::testing::PrintToString(Ids(ids.begin(), ids.begin() + n));
        ASSERT_TRUE(text.starts_with(given)) << "what was given has changed";
      }
      EXPECT_EQ(given + stream.rest(), stream.text());
    }
  }
}

// The shortest text that holds a stop string is where it ends, wherever tokens are cut.
TEST(TextStream, EndsBeforeTheFirstStopString) {
  std::int64_t stopped = 0, going = 0;
  for (const Case& c : all_tokenizers()) {
    SCOPED_TRACE(c.name);
    std::mt19937 random(8);
    for (int i = 0; i < 200; ++i) {
      const Ids ids = random_ids(*c.tokenizer, random, 30);
      // Out of the text, so that it comes, at times only in part.
      const std::string all = c.tokenizer->decode(ids);
      std::vector<std::string> stops;
      for (int s = 0; s < 2 && !all.empty(); ++s) {
        stops.push_back(all.substr(random() % all.size(), 1 + random() % 12));
        if (random() % 3 == 0) stops.back() += '!';
      }
      TextStream stream(*c.tokenizer, stops);
      std::string given, expected;
      for (std::size_t n = 1; n <= ids.size() && !stream.stopped(); ++n) {
        given += stream.add(ids[n - 1]);
        expected = c.tokenizer->decode(std::span(ids).first(n));
        std::size_t end = std::string::npos;
        for (const std::string& stop : stops) end = std::min(end, expected.find(stop));
        ASSERT_EQ(stream.stopped(), end != std::string::npos);
        if (stream.stopped()) expected.resize(end);
        ASSERT_EQ(stream.text(), expected);
      }
      EXPECT_EQ(given + stream.rest(), expected);
      ++(stream.stopped() ? stopped : going);
    }
  }
  EXPECT_GT(stopped, 500);
  EXPECT_GT(going, 100);
}

class Counting final : public Tokenizer {
 public:
  explicit Counting(const Tokenizer& inner) : inner_(inner) {}
  Ids encode(std::string_view text) const override { return inner_.encode(text); }
  std::string decode(std::span<const std::int32_t> ids) const override {
    decoded += ids.size();
    return inner_.decode(ids);
  }
  std::size_t unsettled(std::span<const std::int32_t> ids) const override { return inner_.unsettled(ids); }
  std::int64_t vocab_size() const override { return inner_.vocab_size(); }
  std::string hash() const override { return inner_.hash(); }
  std::string kind() const override { return inner_.kind(); }
  std::int32_t end_of_document() const override { return inner_.end_of_document(); }
  std::string piece(std::int32_t id) const override { return inner_.piece(id); }

  mutable std::size_t decoded = 0;

 private:
  const Tokenizer& inner_;
};

TEST(TextStream, ATokenCostsTheSameHoweverLongTheText) {
  constexpr std::size_t kTokens = 5000;
  for (const Case& c : all_tokenizers()) {
    SCOPED_TRACE(c.name);
    const Counting counting(*c.tokenizer);
    std::mt19937 random(9);
    std::string spelled;
    while (spelled.size() < kTokens) spelled += "\xE6\xBC\xA2\xE2\x82";  // a character, and two thirds of one
    const std::vector<Ids> texts = {random_ids(counting, random, kTokens),
                                    Ids(kTokens, counting.encode(" a")[0]), c.tokenizer->encode(spelled)};
    for (const Ids& ids : texts) {
      counting.decoded = 0;
      TextStream stream(counting, {"no such text"});
      for (const std::int32_t id : ids) stream.add(id);
      EXPECT_LT(counting.decoded, 12 * ids.size() + 100);
    }
  }
}

// Such a model rewrites the text as a whole, after decoding.
TEST(TextStream, ATextThatIsRewrittenAsAWholeStaysTheSame) {
  const testing::TempFolder folder;
  testing::write_bytes(folder / "rules.tsv", "61 62\t78\n61 20 61\t79\n");  // ab: x, "a a": y
  const auto tokenizer = made_by_others({{"denormalization_rule_tsv", folder / "rules.tsv"}});
  std::mt19937 random(10);
  const Ids letters = tokenizer->encode("a b a b");
  int rewritten = 0;
  for (int i = 0; i < 100; ++i) {
    Ids ids;
    TextStream stream(*tokenizer, {});
    std::string given;
    for (int n = 0; n < 20; ++n) {
      ids.push_back(letters[random() % letters.size()]);
      given += stream.add(ids.back());
      ASSERT_EQ(stream.text(), tokenizer->decode(ids));
    }
    EXPECT_EQ(given + stream.rest(), stream.text());
    rewritten += stream.text().find('y') != std::string::npos ? 1 : 0;
  }
  EXPECT_GT(rewritten, 50);
}

}  // namespace
}  // namespace fathom
