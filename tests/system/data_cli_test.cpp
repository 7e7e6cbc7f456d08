// fathom data and fathom tokenizer from the command line: what they print, where, and their exit status.
#include <string>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/system/cli.h"

namespace fathom {
namespace {

using testing::fathom_command;
using testing::Outcome;
using testing::read_bytes;
using testing::TempFolder;
using testing::write_bytes;

TEST(DataCommand, FromTextToStoresAndBack) {
  const TempFolder folder;
  Outcome run = fathom_command(folder, "data synthetic -o s.jsonl --bytes 300000 --seed 3 --json");
  ASSERT_EQ(run.status, 0) << run.err;
  EXPECT_GT(nlohmann::json::parse(run.out).at("documents"), 100);

  run = fathom_command(folder, "tokenizer train s.jsonl --vocab 600 -o s.model --json");
  ASSERT_EQ(run.status, 0) << run.err;
  EXPECT_EQ(run.err, "");
  const std::string hash = nlohmann::json::parse(run.out).at("hash");

  run = fathom_command(folder, "tokenizer inspect s.model --text 'Mara  lives' --json");
  ASSERT_EQ(run.status, 0) << run.err;
  EXPECT_EQ(nlohmann::json::parse(run.out).at("round_trip"), true);

  run =
      fathom_command(folder, "data prepare s.jsonl --tokenizer s.model --valid-fraction 0.1 -o s.h5 --json");
  ASSERT_EQ(run.status, 0) << run.err;
  const nlohmann::json stores = nlohmann::json::parse(run.out);
  EXPECT_EQ(stores.at("valid").at("path"), "s.valid.h5");
  EXPECT_GT(stores.at("train").at("tokens"), stores.at("valid").at("tokens"));

  run = fathom_command(folder, "data inspect s.h5 --tokenizer s.model --json");
  ASSERT_EQ(run.status, 0) << run.err;
  const nlohmann::json store = nlohmann::json::parse(run.out);
  EXPECT_EQ(store.at("tokenizer_hash"), hash);
  EXPECT_EQ(store.at("vocab_size"), 600);
  EXPECT_EQ(store.at("tokens"), stores.at("train").at("tokens"));
  EXPECT_NE(store.at("first_text").get<std::string>().find("lives in"), std::string::npos);

  // For people.
  run = fathom_command(folder, "data inspect s.h5");
  EXPECT_EQ(run.status, 0);
  EXPECT_NE(run.out.find("vocabulary"), std::string::npos);
  run = fathom_command(folder, "data prepare s.jsonl -o b.h5");
  EXPECT_EQ(run.status, 0);
  EXPECT_NE(run.out.find("b.h5"), std::string::npos);
}

TEST(DataCommand, ErrorsAreOneParagraphWithAStatus) {
  const TempFolder folder;
  write_bytes(folder / "bad.txt", "a\xFFz");
  write_bytes(folder / "empty.txt", "");
  write_bytes(folder / "good.txt", "some text");
  const auto expect = [&](const std::string& arguments, int status, const std::string& words) {
    const Outcome run = fathom_command(folder, arguments);
    EXPECT_EQ(run.status, status) << arguments;
    EXPECT_EQ(run.out, "") << arguments;
    EXPECT_NE(run.err.find(words), std::string::npos) << arguments << ": " << run.err;
    EXPECT_EQ(run.err.find('\n'), run.err.size() - 1) << arguments << ": " << run.err;
  };
  expect("data prepare bad.txt -o a.h5 --json", 1, "invalid UTF-8");
  expect("data prepare empty.txt -o a.h5", 1, "no text");
  expect("data prepare good.txt", 2, "--output");
  expect("data prepare good.txt -o a.h5 --valid-fraction 2", 2, "--valid-fraction 2");
  expect("data prepare good.txt -o a.h5 --invalid-utf8 guess", 2, "guess");
  expect("data inspect good.txt", 1, "not a Fathom file");
  expect("data inspect", 2, "STORE");
  expect("tokenizer inspect good.txt", 1, "SentencePiece");
  expect("tokenizer train good.txt --vocab 10 -o a.model", 2, "vocabulary of 10");
  ASSERT_EQ(fathom_command(folder, "data prepare good.txt -o a.h5").status, 0);
  write_bytes(folder / "a.h5", read_bytes(folder / "a.h5").substr(0, 5000));
  expect("data inspect a.h5", 1, "truncated");
}

}  // namespace
}  // namespace fathom
