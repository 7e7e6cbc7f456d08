#include "src/io/synthetic_text.h"

#include <set>

#include <gtest/gtest.h>

#include "src/io/checksum.h"
#include "src/io/text_reader.h"
#include "tests/io/temp.h"

namespace fathom {
namespace {

using testing::TempFolder;

TEST(SyntheticText, EqualSeedsGiveEqualText) {
  EXPECT_EQ(synthetic_text(20000, 3), synthetic_text(20000, 3));
  EXPECT_NE(synthetic_text(20000, 3), synthetic_text(20000, 4));
  std::set<std::string> documents;
  for (std::uint64_t i = 0; i < 500; ++i) documents.insert(synthetic_document(1, i));
  EXPECT_EQ(documents.size(), 500U);
}

TEST(SyntheticText, BracketsCloseInOrder) {
  for (std::uint64_t i = 0; i < 200; ++i) {
    std::string open;
    for (const char c : synthetic_document(2, i)) {
      if (c == '(' || c == '[' || c == '{') open += c;
      if (c == ')' || c == ']' || c == '}') {
        ASSERT_FALSE(open.empty());
        ASSERT_EQ(open.back(), c == ')' ? '(' : c == ']' ? '[' : '{');
        open.pop_back();
      }
    }
    EXPECT_TRUE(open.empty());
  }
}

TEST(SyntheticText, FactsHoldWithinADocument) {
  for (std::uint64_t i = 0; i < 200; ++i) {
    const std::string text = synthetic_document(2, i);
    const std::string name = text.substr(0, text.find(' '));
    const std::size_t lives = text.find(name + " lives in ");
    const std::string fact = text.substr(lives, text.find('.', lives) - lives);
    for (std::size_t at = lives; at != std::string::npos; at = text.find(name + " lives in ", at + 1)) {
      EXPECT_EQ(text.substr(at, fact.size()), fact);
    }
  }
}

TEST(SyntheticText, FilesHoldTheText) {
  const TempFolder folder;
  const std::int64_t documents = write_synthetic_text(folder / "a.txt", 50000, 1);
  EXPECT_EQ(testing::read_bytes(folder / "a.txt"), synthetic_text(50000, 1));
  write_synthetic_text(folder / "a.jsonl", 50000, 1);
  TextReader reader({folder / "a.jsonl"});
  std::string document;
  std::int64_t count = 0;
  for (; reader.next(document); ++count)
    EXPECT_EQ(document, synthetic_document(1, static_cast<std::uint64_t>(count)));
  EXPECT_GE(count, documents);
  testing::expect_user_error([&] { write_synthetic_text(folder / "no/such/a.txt", 10, 1); },
                             {"does not exist"});
  testing::expect_user_error([&] { write_synthetic_text(folder / "a.txt", 0, 1); }, {"--bytes 0"});
}

}  // namespace
}  // namespace fathom
