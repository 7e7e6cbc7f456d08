// Seeded fuzzing of every reader of files: no crash, no hang, and nothing that was changed is accepted in
// silence. FATHOM_FUZZ_INPUTS sets the number of inputs of each test.
#include <algorithm>
#include <iterator>

#include <gtest/gtest.h>

#include "src/io/hdf5_file.h"
#include "src/io/sentencepiece_seal.h"
#include "src/io/sentencepiece_tokenizer.h"
#include "src/io/text_reader.h"
#include "src/io/token_store.h"
#include "tests/io/compress.h"
#include "tests/io/model_fixture.h"
#include "tests/io/mutate.h"
#include "tests/io/temp.h"

namespace fathom {
namespace {

using testing::fuzz_inputs;
using testing::Mutator;
using testing::read_bytes;
using testing::TempFolder;
using testing::write_bytes;

constexpr std::int64_t kDefaultInputs = 2000;

// Tries mutants of `good` on `read`, which must throw a UserError for each that differs.
template <typename Read>
void expect_mutants_refused(const std::string& good, std::uint64_t seed, Read&& read) {
  Mutator mutator(seed);
  std::int64_t refused = 0;
  const std::int64_t inputs = fuzz_inputs(kDefaultInputs);
  for (std::int64_t i = 0; i < inputs; ++i) {
    const std::string mutant = mutator.mutate(good);
    if (mutant == good) continue;
    try {
      read(mutant);
    } catch (const UserError&) {
      ++refused;
      continue;
    }
    FAIL() << "mutant " << i << " was accepted";
  }
  EXPECT_GT(refused, inputs / 2);
}

TEST(Fuzz, TokenStore) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  {
    const ByteTokenizer bytes;
    TokenStoreWriter out(path, describe(bytes, "fuzz"));
    for (std::uint64_t i = 0; i < 3; ++i) {
      const std::string text = synthetic_document(1, i);
      out.add_document(bytes.encode(text), text);
    }
    out.commit();
  }
  expect_mutants_refused(read_bytes(path), 1, [&](const std::string& mutant) {
    write_bytes(path, mutant);
    TokenStore::open(path);
  });
}

TEST(Fuzz, TokenizerModel) {
  const std::string& good = testing::small_model();
  Mutator mutator(3);
  std::int64_t refused = 0;
  std::int64_t foreign = 0;
  const std::int64_t inputs = fuzz_inputs(kDefaultInputs);
  for (std::int64_t i = 0; i < inputs; ++i) {
    const std::string mutant = mutator.mutate(good);
    if (mutant == good) continue;
    try {
      make_sentencepiece(mutant, "mutant");
    } catch (const UserError&) {
      ++refused;
      continue;
    }
    // Only a model that lost the whole seal may load: it is another program's then, and stores tell it by its
    // hash.
    ASSERT_EQ(check_seal(mutant), Seal::Absent) << "mutant " << i << " was accepted";
    ++foreign;
  }
  EXPECT_GT(refused, inputs / 2);
  EXPECT_LT(foreign, inputs / 10);
}

// The change happens before the checksum is made, so that it reaches the checks of the content: whatever
// opens must keep the promises of the interface.
TEST(Fuzz, TokenStoreContent) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  Mutator m(4);
  std::int64_t opened = 0;
  const std::int64_t inputs = fuzz_inputs(500);
  for (std::int64_t i = 0; i < inputs; ++i) {
    std::vector<std::uint16_t> tokens = {1, 2, 3, 4, 5, 6, 7, 2};
    std::vector<std::int64_t> starts = {0, 4, 8};
    std::vector<std::uint64_t> hashes = {1, 2};
    std::vector<std::int64_t> dims = {};
    std::int64_t attributes[] = {10, 7, 8, 2, 2, -1, 12};
    const char* names[] = {"vocab_size",      "max_id", "num_tokens", "num_documents",
                           "end_of_document", "bos",    "text_bytes"};
    std::string kind = "bytes";
    std::size_t left_out = 100;
    for (std::size_t change = m.below(3) + (i == 0 ? 0 : 1); change > 0 && i > 0; --change) {
      switch (m.below(9)) {
        case 0:
          tokens[m.below(tokens.size())] = static_cast<std::uint16_t>(m.integer());
          break;
        case 1:
          tokens.resize(1 + m.below(20));
          break;
        case 2:
          starts[m.below(starts.size())] = m.integer();
          break;
        case 3:
          starts.resize(1 + m.below(5), m.integer());
          break;
        case 4:
          hashes.resize(m.below(5));
          break;
        case 5:
          attributes[m.below(7)] = m.integer();
          break;
        case 6:
          left_out = m.below(9);
          break;
        case 7:
          kind = m.mutate(kind);
          break;
        default:
          dims = {2, static_cast<std::int64_t>(tokens.size() / 2)};
          break;
      }
    }
    if (dims.size() == 2 && dims[0] * dims[1] != static_cast<std::int64_t>(tokens.size())) dims.clear();
    {
      H5Writer out(path, kTokenStoreKind);
      if (left_out != 7) out.write<std::uint16_t>("tokens", tokens, dims);
      if (left_out != 8) out.write<std::int64_t>("document_starts", starts);
      out.write<std::uint64_t>("document_hashes", hashes);
      for (std::size_t a = 0; a < 7; ++a) {
        if (left_out != a) out.set_int(names[a], attributes[a]);
      }
      out.set_string("tokenizer_kind", kind.substr(0, kind.find('\0')));
      out.set_string("tokenizer_hash", "x");
      out.set_string("source_hash", "x");
      out.set_string("recipe", "");
      out.commit();
    }
    try {
      TokenStore::Options options;
      options.memory_limit = m.below(2) == 0 ? 0 : 1 << 20;
      const TokenStore store = TokenStore::open(path, options);
      ++opened;
      std::vector<std::int32_t> all(static_cast<std::size_t>(store.num_tokens()));
      store.read(0, all);
      for (const std::int32_t id : all) {
        ASSERT_GE(id, 0);
        ASSERT_LT(id, store.vocab_size());
      }
      ASSERT_EQ(store.document_starts().front(), 0);
      ASSERT_EQ(store.document_starts().back(), store.num_tokens());
      ASSERT_EQ(static_cast<std::int64_t>(store.document_starts().size()), store.num_documents() + 1);
      ASSERT_TRUE(std::is_sorted(store.document_starts().begin(), store.document_starts().end()));
      ASSERT_LT(store.info().end_of_document, store.vocab_size());
    } catch (const UserError&) {
      ASSERT_GT(i, 0) << "the unchanged content must open";
    }
  }
  EXPECT_GT(opened, 0);
  EXPECT_LT(opened, inputs);
}

// Text may be anything: it is read or refused.
TEST(Fuzz, TextFiles) {
  const TempFolder folder;
  const std::string text = synthetic_text(3000, 1);
  const std::string lines =
      "{\"text\": \"one two\", \"title\": \"t\\u00e9\"}\n{\"text\": \"three\\nfour\"}\n";
  struct Case {
    std::string path;
    std::string good;
  };
  const Case cases[] = {{folder / "a.txt", text},
                        {folder / "a.jsonl", lines},
                        {folder / "a.txt.gz", testing::gzip(text)},
                        {folder / "a.txt.xz", testing::xz(text)},
                        {folder / "a.txt.zst", testing::zstd(text)},
                        {folder / "a.jsonl.zst", testing::zstd(lines)}};
  Mutator mutator(5);
  const std::int64_t inputs = fuzz_inputs(kDefaultInputs);
  for (std::int64_t i = 0; i < inputs; ++i) {
    const Case& c = cases[mutator.below(std::size(cases))];
    write_bytes(c.path, mutator.mutate(c.good));
    try {
      TextReader reader({c.path});
      std::string document;
      std::size_t bytes = 0;
      while (reader.next(document)) bytes += document.size();
      EXPECT_LT(bytes, std::size_t{1} << 20);
    } catch (const UserError&) {
      continue;
    }
  }
}

}  // namespace
}  // namespace fathom
