#include "src/io/prepare.h"

#include <cmath>
#include <cstring>
#include <filesystem>
#include <set>

#include <gtest/gtest.h>

#include "src/io/load_tokenizer.h"
#include "src/io/sentencepiece_tokenizer.h"
#include "src/io/synthetic_text.h"
#include "src/io/token_store.h"
#include "tests/io/compress.h"
#include "tests/io/model_fixture.h"
#include "tests/io/temp.h"

namespace fathom {
namespace {

using testing::expect_user_error;
using testing::read_bytes;
using testing::TempFolder;
using testing::write_bytes;

std::string text_of(const TokenStore& store, const Tokenizer& tokenizer) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(store.num_tokens()));
  store.read(0, ids);
  return tokenizer.decode(ids);
}

PrepareOptions make_options(std::vector<std::string> inputs, std::string output) {
  PrepareOptions options;
  options.inputs = std::move(inputs);
  options.output = std::move(output);
  return options;
}

TEST(Prepare, TheStoreHoldsTheText) {
  const TempFolder folder;
  const std::string text = synthetic_text(800000, 1);
  write_bytes(folder / "a.txt.xz", testing::xz(text));
  write_bytes(folder / "bpe.model", testing::small_model());
  for (const std::string& tokenizer : {std::string("bytes"), folder / "bpe.model"}) {
    PrepareOptions options = make_options({folder / "a.txt.xz"}, folder / "a.h5");
    options.tokenizer = tokenizer;
    std::int64_t last = 0;
    options.on_progress = [&](const PrepareProgress& p) {
      EXPECT_LE(p.bytes_done, p.bytes_total);
      EXPECT_GE(p.tokens, last);
      last = p.tokens;
    };
    const PrepareResult result = prepare(options);
    EXPECT_EQ(last, result.train.tokens);
    EXPECT_FALSE(result.valid);
    const TokenStore store = TokenStore::open(folder / "a.h5");
    const auto loaded = load_tokenizer(tokenizer);
    EXPECT_NO_THROW(require_tokenizer(store, *loaded, tokenizer));
    EXPECT_EQ(text_of(store, *loaded), text);
    EXPECT_EQ(store.text_bytes(), static_cast<std::int64_t>(text.size()));
    EXPECT_EQ(store.num_tokens(), result.train.tokens);
    EXPECT_EQ(store.num_documents(), result.train.documents);
    std::vector<std::int32_t> end(1);
    for (std::size_t i = 1; i < store.document_starts().size(); ++i) {
      store.read(store.document_starts()[i] - 1, end);
      EXPECT_EQ(end[0], loaded->end_of_document());
    }
  }
}

TEST(Prepare, ThreadsPathsAndPackingDoNotChangeTheStore) {
  const TempFolder folder;
  write_synthetic_text(folder / "a.jsonl", 1500000, 1);
  write_bytes(folder / "other name.jsonl.gz", testing::gzip(read_bytes(folder / "a.jsonl")));
  write_bytes(folder / "bpe.model", testing::small_model());
  std::set<std::string> train;
  std::set<std::string> valid;
  int run = 0;
  for (const int threads : {1, 2, 5}) {
    for (const char* input : {"a.jsonl", "other name.jsonl.gz"}) {
      PrepareOptions options = make_options({folder / input}, folder / (std::to_string(run++) + ".h5"));
      options.tokenizer = folder / "bpe.model";
      options.threads = threads;
      options.valid_fraction = 0.1;
      const PrepareResult result = prepare(options);
      train.insert(read_bytes(result.train.path));
      valid.insert(read_bytes(result.valid->path));
    }
  }
  EXPECT_EQ(train.size(), 1U);
  EXPECT_EQ(valid.size(), 1U);
}

TEST(Prepare, SplitsByDocument) {
  const TempFolder folder;
  // Every document twice: both copies fall on one side.
  write_synthetic_text(folder / "a.jsonl", 1000000, 1);
  const std::string lines = read_bytes(folder / "a.jsonl");
  write_bytes(folder / "a.jsonl", lines + lines);
  PrepareOptions options = make_options({folder / "a.jsonl"}, folder / "a.h5");
  options.valid_fraction = 0.2;
  const PrepareResult result = prepare(options);
  ASSERT_TRUE(result.valid);
  EXPECT_EQ(result.valid->path, folder / "a.valid.h5");
  const double share = static_cast<double>(result.valid->documents) /
                       static_cast<double>(result.valid->documents + result.train.documents);
  EXPECT_NEAR(share, 0.2, 0.05);
  const TokenStore train = TokenStore::open(result.train.path);
  const TokenStore valid = TokenStore::open(result.valid->path);
  const std::set<std::uint64_t> a(train.document_hashes().begin(), train.document_hashes().end());
  const std::set<std::uint64_t> b(valid.document_hashes().begin(), valid.document_hashes().end());
  for (const std::uint64_t hash : b) EXPECT_EQ(a.count(hash), 0U);
  EXPECT_EQ(a.size() * 2, static_cast<std::size_t>(train.num_documents()));
  EXPECT_EQ(train.text_bytes() + valid.text_bytes(), result.train.text_bytes + result.valid->text_bytes);
  // Without a fraction the older validation store stays, and a warning says what that means.
  options.valid_fraction = 0;
  EXPECT_NE(prepare(options).warning.find("a.valid.h5"), std::string::npos);
}

TEST(Prepare, Errors) {
  const TempFolder folder;
  const std::string input = folder / "a.txt";
  const std::string output = folder / "a.h5";
  PrepareOptions options = make_options({input}, output);
  const auto run = [&] { prepare(options); };
  expect_user_error(run, {input, "No such file"});
  write_bytes(input, "");
  expect_user_error(run, {input, "no text", output, "empty"});
  write_bytes(input, "short text");
  options.valid_fraction = 0.5;
  expect_user_error(run, {"--valid-fraction 0.5", "1 documents", "hash"});
  EXPECT_FALSE(std::filesystem::exists(output)) << "nothing is written when a side is empty";
  for (const double fraction : {1.0, -0.1, 2.0, std::nan("")}) {
    options.valid_fraction = fraction;
    EXPECT_THROW(run(), UsageError);
  }
  options.valid_fraction = 0;
  options.tokenizer = folder / "absent.model";
  expect_user_error(run, {"absent.model", "No such file"});
  options.tokenizer = "bytes";
  options.output = folder / "no/such/a.h5";
  expect_user_error(run, {"no/such", "does not exist"});
  options.output = output;
  options.inputs = {};
  EXPECT_THROW(run(), UsageError);
  options.inputs = {input, folder / "b.bin"};
  expect_user_error(run, {"text and .bin"});
  // A store that was there before survives a failure.
  options.inputs = {input};
  prepare(options);
  const std::string before = read_bytes(output);
  write_bytes(input, "good \xFF bad");
  expect_user_error(run, {input, "byte 5", "invalid UTF-8"});
  EXPECT_EQ(read_bytes(output), before);
}

std::string header(std::int32_t magic, std::int32_t version, std::int32_t tokens) {
  std::string bytes(1024, '\0');
  const std::int32_t fields[] = {magic, version, tokens};
  std::memcpy(bytes.data(), fields, sizeof(fields));
  return bytes;
}

template <typename T>
std::string raw(const std::vector<std::int32_t>& ids) {
  std::string bytes;
  for (const std::int32_t id : ids) {
    const T value = static_cast<T>(id);
    bytes.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  return bytes;
}

TEST(Prepare, BinFilesOfLlmCAndNanoGpt) {
  const TempFolder folder;
  const std::vector<std::int32_t> end_first = {50256, 1, 2, 50256, 3, 4, 5, 50256, 6};
  const std::vector<std::int32_t> end_last = {1, 2, 50256, 3, 4, 5, 50256, 6};
  const auto check = [&](const std::string& bytes, const std::vector<std::int32_t>& ids,
                         const std::vector<std::int64_t>& starts) {
    write_bytes(folder / "a.bin", bytes);
    PrepareOptions options = make_options({folder / "a.bin"}, folder / "a.h5");
    options.external_vocab = 50257;
    options.external_end = 50256;
    prepare(options);
    const TokenStore store = TokenStore::open(folder / "a.h5");
    std::vector<std::int32_t> read(static_cast<std::size_t>(store.num_tokens()));
    store.read(0, read);
    EXPECT_EQ(read, ids);
    EXPECT_EQ(std::vector<std::int64_t>(store.document_starts().begin(), store.document_starts().end()),
              starts);
    EXPECT_EQ(store.info().tokenizer_kind, "external");
    EXPECT_EQ(store.text_bytes(), 0);
    EXPECT_FALSE(store.is_bytes());
  };
  check(header(20240520, 1, 9) + raw<std::uint16_t>(end_first), end_first, {0, 3, 7, 9});
  check(header(20240801, 7, 9) + raw<std::uint32_t>(end_first), end_first, {0, 3, 7, 9});
  check(raw<std::uint16_t>(end_last), end_last, {0, 3, 7, 8});
  // Longer than a buffer, without ends.
  std::vector<std::int32_t> many(3000000);
  for (std::size_t i = 0; i < many.size(); ++i) many[i] = static_cast<std::int32_t>(i % 50000);
  check(raw<std::uint16_t>(many), many, {0, 1 << 20, 2 << 20, 3000000});
}

TEST(Prepare, BadBinFiles) {
  const TempFolder folder;
  const std::string path = folder / "a.bin";
  PrepareOptions options = make_options({path}, folder / "a.h5");
  const auto run = [&] { prepare(options); };
  write_bytes(path, raw<std::uint16_t>({1, 2, 60000}));
  expect_user_error(run, {path, "--vocab-size", "50257"});
  options.external_vocab = 50257;
  expect_user_error(run, {"60000", "[0, 50257)"});
  write_bytes(path, header(20240520, 1, 9) + raw<std::uint16_t>({1, 2}));
  expect_user_error(run, {path, "9 tokens", "1028 bytes"});
  write_bytes(path, header(20240520, 3, 2) + raw<std::uint16_t>({1, 2}));
  expect_user_error(run, {path, "version 3"});
  write_bytes(path, header(20240520, 1, 0));
  expect_user_error(run, {path, "no tokens"});
  write_bytes(path, "odd");
  expect_user_error(run, {path, "3 bytes", "nanoGPT"});
  write_bytes(path, "");
  expect_user_error(run, {path, "no tokens"});
}

}  // namespace
}  // namespace fathom
