#include "src/io/token_store.h"

#include <numeric>
#include <random>
#include <utility>

#include <gtest/gtest.h>

#include "src/io/hdf5_file.h"
#include "tests/io/temp.h"

namespace fathom {
namespace {

using testing::expect_user_error;
using testing::read_bytes;
using testing::TempFolder;

const ByteTokenizer kBytes;

void write_store(const std::string& path, const std::vector<std::string>& documents) {
  TokenStoreWriter out(path, describe(kBytes, "test"));
  for (const std::string& d : documents) out.add_document(kBytes.encode(d), d);
  out.commit();
}

TEST(TokenStore, HoldsTheDocumentsWithTheirEnds) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  write_store(path, {"one", "", "three"});
  const TokenStore store = TokenStore::open(path);
  EXPECT_EQ(store.num_tokens(), 3 + 1 + 0 + 1 + 5 + 1);
  EXPECT_EQ(store.num_documents(), 3);
  EXPECT_EQ(store.vocab_size(), 257);
  EXPECT_EQ(store.text_bytes(), 8);
  EXPECT_TRUE(store.is_bytes());
  EXPECT_EQ(store.tokenizer_hash(), "bytes");
  EXPECT_EQ(store.info().end_of_document, 256);
  EXPECT_EQ(store.info().bos, -1);
  EXPECT_EQ(store.info().recipe, "test");
  EXPECT_EQ(store.source_hash().size(), 32U);
  EXPECT_EQ(store.content_hash().size(), 16U);
  const auto starts = store.document_starts();
  EXPECT_EQ(std::vector<std::int64_t>(starts.begin(), starts.end()),
            (std::vector<std::int64_t>{0, 4, 5, 11}));
  std::vector<std::int32_t> ids(11);
  store.read(0, ids);
  EXPECT_EQ(kBytes.decode(ids), "onethree");
  EXPECT_EQ(ids[3], 256);
  std::vector<std::int32_t> two(2);
  store.read(9, two);
  EXPECT_EQ(two, (std::vector<std::int32_t>{'e', 256}));
  EXPECT_THROW(store.read(10, two), InternalError);
  EXPECT_THROW(store.read(-1, two), InternalError);
  EXPECT_THROW(store.read(std::int64_t{1} << 62, two), InternalError);
}

TEST(TokenStore, EqualInputGivesEqualBytesAndHashesTellTextsApart) {
  const TempFolder folder;
  write_store(folder / "a.h5", {"ab", "c"});
  write_store(folder / "b.h5", {"ab", "c"});
  write_store(folder / "c.h5", {"a", "bc"});
  EXPECT_EQ(read_bytes(folder / "a.h5"), read_bytes(folder / "b.h5"));
  const TokenStore a = TokenStore::open(folder / "a.h5");
  const TokenStore b = TokenStore::open(folder / "b.h5");
  const TokenStore c = TokenStore::open(folder / "c.h5");
  EXPECT_EQ(a.content_hash(), b.content_hash());
  EXPECT_NE(a.content_hash(), c.content_hash());
  EXPECT_NE(a.source_hash(), c.source_hash());
}

// Narrow and wide ids, from memory and from the file, across chunks: the same tokens.
TEST(TokenStore, ReadsTheSameFromMemoryAndFromTheFile) {
  const TempFolder folder;
  for (const std::int64_t vocab :
       {std::int64_t{50257}, std::int64_t{65536}, std::int64_t{65537}, std::int64_t{200000}}) {
    const std::string path = folder / std::to_string(vocab);
    std::mt19937 random(3);
    std::vector<std::int32_t> all;
    {
      TokenStoreInfo info;
      info.tokenizer_kind = "external";
      info.tokenizer_hash = "external";
      info.vocab_size = vocab;
      TokenStoreWriter out(path, info);
      std::uniform_int_distribution<std::int32_t> id(0, static_cast<std::int32_t>(vocab) - 1);
      std::uniform_int_distribution<std::size_t> length(1, 300000);
      while (all.size() < 2500000) {
        std::vector<std::int32_t> document(length(random));
        for (auto& t : document) t = id(random);
        document[0] = static_cast<std::int32_t>(vocab) - 1;
        out.add_tokens(document);
        all.insert(all.end(), document.begin(), document.end());
      }
      out.commit();
    }
    TokenStore::Options from_file;
    from_file.memory_limit = 0;
    const TokenStore memory = TokenStore::open(path);
    const TokenStore file = TokenStore::open(path, from_file);
    ASSERT_EQ(memory.num_tokens(), static_cast<std::int64_t>(all.size()));
    std::vector<std::int32_t> a(1025);
    std::vector<std::int32_t> b(1025);
    for (int i = 0; i < 50; ++i) {
      const auto offset = static_cast<std::int64_t>(random() % (all.size() - a.size()));
      memory.read(offset, a);
      file.read(offset, b);
      EXPECT_TRUE(std::equal(a.begin(), a.end(), all.begin() + offset));
      EXPECT_EQ(a, b);
    }
  }
}

TEST(TokenStore, RefusesEmptyTextAndForeignIds) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  TokenStoreWriter empty(path, describe(kBytes, ""));
  expect_user_error([&] { empty.commit(); }, {path, "no tokens", "empty"});
  const TempFolder other;
  TokenStoreWriter out(other / "b.h5", describe(kBytes, ""));
  expect_user_error([&] { out.add_document(std::vector<std::int32_t>{300}, "x"); },
                    {"b.h5", "300", "[0, 257)"});
  expect_user_error([&] { out.add_document(std::vector<std::int32_t>{-1}, "x"); }, {"b.h5", "-1"});
}

// A store with a right checksum and one wrong thing in it.
struct Content {
  std::vector<std::uint16_t> tokens = {1, 2, 3, 4};
  std::vector<std::int64_t> tokens_dims = {};
  std::vector<std::int64_t> starts = {0, 2, 4};
  std::vector<std::uint64_t> hashes = {5, 6};
  std::int64_t vocab_size = 10;
  std::int64_t max_id = 4;
  std::int64_t num_tokens = 4;
  std::int64_t num_documents = 2;
  std::int64_t end_of_document = 2;
  std::int64_t bos = -1;
  std::int64_t text_bytes = 4;
  std::string kind = "bytes";
  bool with_tokens = true;
  bool with_vocab = true;
  bool narrow = true;
};

void write_content(const std::string& path, const Content& c) {
  H5Writer out(path, kTokenStoreKind);
  if (c.with_tokens && c.narrow) out.write<std::uint16_t>("tokens", c.tokens, c.tokens_dims);
  if (c.with_tokens && !c.narrow) {
    out.write<std::uint32_t>("tokens", std::vector<std::uint32_t>(c.tokens.begin(), c.tokens.end()),
                             c.tokens_dims);
  }
  out.write<std::int64_t>("document_starts", c.starts);
  out.write<std::uint64_t>("document_hashes", c.hashes);
  if (c.with_vocab) out.set_int("vocab_size", c.vocab_size);
  out.set_int("max_id", c.max_id);
  out.set_int("num_tokens", c.num_tokens);
  out.set_int("num_documents", c.num_documents);
  out.set_int("end_of_document", c.end_of_document);
  out.set_int("bos", c.bos);
  out.set_int("text_bytes", c.text_bytes);
  out.set_string("tokenizer_kind", c.kind);
  out.set_string("tokenizer_hash", "x");
  out.set_string("source_hash", "x");
  out.set_string("recipe", "");
  out.commit();
}

TEST(TokenStore, ChecksWhatTheChecksumCannot) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  write_content(path, Content());
  EXPECT_EQ(TokenStore::open(path).num_tokens(), 4);  // the content itself is fine
  const auto expect = [&](std::initializer_list<std::string> words, auto change) {
    Content c;
    change(c);
    write_content(path, c);
    expect_user_error([&] { TokenStore::open(path); }, words);
    TokenStore::Options from_file;
    from_file.memory_limit = 0;
    expect_user_error([&] { TokenStore::open(path, from_file); }, words);
  };
  expect({"no dataset tokens"}, [](Content& c) { c.with_tokens = false; });
  expect({"no attribute vocab_size"}, [](Content& c) { c.with_vocab = false; });
  expect({"does not hold uint16"}, [](Content& c) { c.narrow = false; });
  expect({"tokens", "[2, 2]", "[4]"}, [](Content& c) { c.tokens_dims = {2, 2}; });
  expect({"tokens", "[3]", "[4]"}, [](Content& c) { c.tokens = {1, 2, 3}; });
  expect({"token 3", "id 10", "[0, 10)"}, [](Content& c) { c.tokens[3] = 10; });
  expect({"max_id", "10"}, [](Content& c) { c.max_id = 10; });
  expect({"max_id", "-1"}, [](Content& c) { c.max_id = -1; });
  expect({"vocab_size", "0"}, [](Content& c) { c.vocab_size = 0; });
  expect({"vocab_size"}, [](Content& c) { c.vocab_size = std::int64_t{1} << 40; });
  expect({"num_tokens", "-4"}, [](Content& c) { c.num_tokens = -4; });
  expect({"num_documents", "-1"}, [](Content& c) { c.num_documents = -1; });
  expect({"num_documents", "5"}, [](Content& c) { c.num_documents = 5; });
  expect({"document_starts", "[4]"}, [](Content& c) { c.starts = {0, 1, 2, 4}; });
  expect({"not ascending"}, [](Content& c) { c.starts = {0, 5, 4}; });
  expect({"not ascending"}, [](Content& c) { c.starts = {0, 0, 4}; });
  expect({"start at 1"}, [](Content& c) { c.starts = {1, 2, 4}; });
  expect({"end at 3"}, [](Content& c) { c.starts = {0, 2, 3}; });
  expect({"document_hashes"}, [](Content& c) { c.hashes = {1}; });
  expect({"end_of_document", "10"}, [](Content& c) { c.end_of_document = 10; });
  expect({"bos", "-2"}, [](Content& c) { c.bos = -2; });
  expect({"text_bytes", "-4"}, [](Content& c) { c.text_bytes = -4; });
  expect({"tokenizer kind", "words"}, [](Content& c) { c.kind = "words"; });
}

TEST(TokenStore, AnotherTokenizerIsRefused) {
  const TempFolder folder;
  write_content(folder / "a.h5", Content());
  const TokenStore store = TokenStore::open(folder / "a.h5");
  expect_user_error([&] { require_tokenizer(store, kBytes, "bytes"); },
                    {"a.h5", "another tokenizer", "257", "10"});
}

}  // namespace
}  // namespace fathom
