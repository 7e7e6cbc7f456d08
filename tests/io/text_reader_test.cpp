#include "src/io/text_reader.h"

#include <functional>
#include <numeric>

#include <gtest/gtest.h>

#include "src/io/byte_source.h"
#include "src/io/synthetic_text.h"
#include "src/io/utf8.h"
#include "tests/io/compress.h"
#include "tests/io/temp.h"

namespace fathom {
namespace {

using testing::expect_user_error;
using testing::TempFolder;
using testing::write_bytes;

std::vector<std::string> read_all(const std::vector<std::string>& paths, TextReaderOptions options = {}) {
  TextReader reader(paths, std::move(options));
  std::vector<std::string> documents;
  std::string document;
  while (reader.next(document)) documents.push_back(document);
  EXPECT_EQ(reader.bytes_done(), reader.bytes_total());
  return documents;
}

std::string concatenate(const std::vector<std::string>& parts) {
  return std::accumulate(parts.begin(), parts.end(), std::string());
}

TEST(TextReader, ShortPlainTextIsOneDocument) {
  const TempFolder folder;
  write_bytes(folder / "a.txt", "One.\n\nTwo.\r\n\f  three");
  EXPECT_EQ(read_all({folder / "a.txt"}), std::vector<std::string>{"One.\n\nTwo.\r\n\f  three"});
}

TEST(TextReader, LongPlainTextIsCutAtParagraphsAndNothingIsLost) {
  const TempFolder folder;
  const std::string text = synthetic_text(700000, 5);
  write_bytes(folder / "a.txt", text);
  const auto documents = read_all({folder / "a.txt"});
  EXPECT_GT(documents.size(), 30U);
  EXPECT_EQ(concatenate(documents), text);
  for (std::size_t i = 0; i + 1 < documents.size(); ++i) {
    EXPECT_GT(documents[i].size(), std::size_t{1} << 14);
    EXPECT_EQ(documents[i].substr(documents[i].size() - 2), "\n\n") << i;
    EXPECT_NE(documents[i + 1][0], '\n');
  }
}

TEST(TextReader, TextWithoutParagraphsIsCutAtOneMebibyteOutsideCharacters) {
  const TempFolder folder;
  std::string text;
  while (text.size() < 3000000) text += "\xE2\x82\xAC";  // three bytes: 1 MiB is not a multiple
  write_bytes(folder / "a.txt", text);
  const auto documents = read_all({folder / "a.txt"});
  EXPECT_EQ(documents.size(), 3U);
  EXPECT_EQ(concatenate(documents), text);
  for (const std::string& d : documents) {
    EXPECT_LE(d.size(), std::size_t{1} << 20);
    EXPECT_EQ(utf8_prefix(d), d.size());
  }
  std::string lines;
  while (lines.size() < 3000000) lines += "word word\n";
  write_bytes(folder / "b.txt", lines);
  for (const std::string& d : read_all({folder / "b.txt"})) EXPECT_EQ(d.back(), '\n');
}

TEST(TextReader, JsonLines) {
  const TempFolder folder;
  write_bytes(folder / "a.jsonl",
              "{\"title\": \"x\", \"text\": \"one\\ntwo\"}\r\n\n{\"text\": \"\"}\n{\"text\": "
              "\"\\u00e9\\ud83d\\ude00\"}");
  EXPECT_EQ(read_all({folder / "a.jsonl"}),
            (std::vector<std::string>{"one\ntwo", "\xC3\xA9\xF0\x9F\x98\x80"}));
  write_bytes(folder / "b.ndjson", "{\"body\": \"b\"}\n");
  TextReaderOptions options;
  options.field = "body";
  EXPECT_EQ(read_all({folder / "b.ndjson"}, options), std::vector<std::string>{"b"});
}

TEST(TextReader, FilesComeInOrderAndAByteOrderMarkIsDropped) {
  const TempFolder folder;
  write_bytes(folder / "a.txt",
              "\xEF\xBB\xBF"
              "first");
  write_bytes(folder / "empty.txt", "");
  write_bytes(folder / "b.jsonl", "{\"text\": \"second\"}");
  EXPECT_EQ(read_all({folder / "a.txt", folder / "empty.txt", folder / "b.jsonl"}),
            (std::vector<std::string>{"first", "second"}));
}

using Compress = std::string (*)(const std::string&);
struct Format {
  const char* suffix;
  Compress compress;
  friend void PrintTo(const Format& f, std::ostream* out) { *out << f.suffix; }
};
class Compressed : public ::testing::TestWithParam<Format> {};

TEST_P(Compressed, GivesWhatWasCompressed) {
  const TempFolder folder;
  const auto [suffix, compress] = GetParam();
  const std::string text = synthetic_text(2000000, 1);
  const std::string path = folder / (std::string("a.txt") + suffix);
  write_bytes(path, compress(text));
  EXPECT_EQ(concatenate(read_all({path})), text);
  // Members one after the other, an empty one among them.
  write_bytes(path, compress(text) + compress("") + compress(text));
  EXPECT_EQ(concatenate(read_all({path})), text + text);
  const std::string lines = folder / (std::string("a.jsonl") + suffix);
  write_bytes(lines, compress("{\"text\": \"one\"}\n{\"text\": \"two\"}\n"));
  EXPECT_EQ(read_all({lines}), (std::vector<std::string>{"one", "two"}));
  // The content decides, not the name.
  write_bytes(folder / "plain.txt", compress("hello"));
  EXPECT_EQ(read_all({folder / "plain.txt"}), std::vector<std::string>{"hello"});
}

TEST_P(Compressed, DamageIsNoticed) {
  const TempFolder folder;
  const auto [suffix, compress] = GetParam();
  const std::string path = folder / (std::string("a.txt") + suffix);
  const std::string good = compress(synthetic_text(300000, 2));
  for (const std::size_t size : {good.size() - 1, good.size() / 2, std::size_t{20}}) {
    write_bytes(path, good.substr(0, size));
    expect_user_error([&] { read_all({path}); }, {path, "truncated", "too early"});
  }
  std::string bad = good;
  bad[bad.size() / 2] = static_cast<char>(bad[bad.size() / 2] ^ 0x55);
  write_bytes(path, bad);
  expect_user_error([&] { read_all({path}); }, {path, "damaged", "byte"});
  write_bytes(path, good + "some text that is no member");
  expect_user_error([&] { read_all({path}); }, {path, "damaged"});
  write_bytes(path, "not compressed");
  expect_user_error([&] { read_all({path}); }, {path, "named", suffix});
  write_bytes(path, "");
  expect_user_error([&] { read_all({path}); }, {path, "empty"});
}

INSTANTIATE_TEST_SUITE_P(All, Compressed,
                         ::testing::Values(Format{".gz", testing::gzip}, Format{".xz", testing::xz},
                                           Format{".zst", testing::zstd}),
                         [](const auto& p) { return std::string(p.param.suffix + 1); });

TEST(TextReader, InvalidUtf8ByPolicy) {
  const TempFolder folder;
  const std::string path = folder / "a.txt";
  write_bytes(path, "good \xFF\xFE bad \xC3\xA9");
  expect_user_error([&] { read_all({path}); }, {path, "byte 5", "0xff", "invalid UTF-8", "--invalid-utf8"});
  TextReaderOptions options;
  options.invalid_utf8 = InvalidUtf8::Replace;
  EXPECT_EQ(read_all({path}, options), std::vector<std::string>{"good \xEF\xBF\xBD bad \xC3\xA9"});
  options.invalid_utf8 = InvalidUtf8::Skip;
  EXPECT_TRUE(read_all({path}, options).empty());

  const std::string lines = folder / "a.jsonl";
  write_bytes(lines, "{\"text\": \"one\"}\n{\"text\": \"\xC0\xAF\"}\n{\"text\": \"three\"}\n");
  expect_user_error([&] { read_all({lines}); }, {lines + ":2", "invalid UTF-8"});
  EXPECT_EQ(read_all({lines}, options), (std::vector<std::string>{"one", "three"}));
  TextReader reader({lines}, options);
  std::string document;
  while (reader.next(document)) continue;
  EXPECT_EQ(reader.skipped(), 1);

  // A byte far into a long file is named by its place in the text.
  const std::string text = synthetic_text(200000, 1);
  write_bytes(path, text + "\xFF");
  expect_user_error([&] { read_all({path}); }, {"byte " + std::to_string(text.size()) + ":"});
}

TEST(TextReader, BadJsonLinesAreNamed) {
  const TempFolder folder;
  const std::string path = folder / "a.jsonl";
  const auto read = [&] { read_all({path}); };
  write_bytes(path, "{\"text\": \"one\"}\n{\"text\": \n");
  expect_user_error(read, {path + ":2", "not valid JSON"});
  // A line that was cut off: where and why, without the book in it.
  write_bytes(path, "{\"text\": \"" + std::string(100000, 'x'));
  expect_user_error(read, {path + ":1", "not valid JSON", "column 10001", "missing closing quote"});
  try {
    read();
  } catch (const UserError& e) {
    EXPECT_LT(std::string(e.what()).size(), path.size() + 300);
  }
  write_bytes(path, "{\"text\": \"one\"}\n\n{\"body\": \"x\"}\n");
  expect_user_error(read, {path + ":3", "no string \"text\""});
  write_bytes(path, "{\"text\": 5}\n");
  expect_user_error(read, {path + ":1", "no string \"text\""});
  write_bytes(path, "[1]\n");
  expect_user_error(read, {path + ":1", "no string \"text\""});
  write_bytes(path, "{\"text\": \"\\ud800\"}\n");
  expect_user_error(read, {path + ":1", "not valid JSON"});
}

TEST(TextReader, FilesThatCannotBeRead) {
  const TempFolder folder;
  expect_user_error([&] { read_all({folder / "absent.txt"}); }, {"absent.txt", "No such file"});
  expect_user_error([&] { read_all({folder.path()}); }, {folder.path(), "is a folder"});
  EXPECT_THROW(parse_invalid_utf8("ignore"), UsageError);
}

TEST(Utf8, KnowsValidFromInvalid) {
  for (const std::string& good :
       std::vector<std::string>{"", "abc", "\xC2\x80", "\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80",
                                "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF", std::string("\0", 1)}) {
    EXPECT_EQ(utf8_prefix(good), good.size());
    EXPECT_EQ(utf8_prefix("12345678" + good + "12345678"), good.size() + 16);
  }
  for (const std::string bad :
       {"\x80", "\xC0\xAF", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xF0\x8F\xBF\xBF",
        "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xC3", "\xE2\x82", "\xF0\x9F\x98", "\xFF"}) {
    EXPECT_EQ(utf8_prefix("x" + bad), 1U);
    EXPECT_EQ(utf8_prefix("123456789" + bad + "12345678"), 9U);
    EXPECT_EQ(utf8_prefix(replace_invalid_utf8(bad + "y")), replace_invalid_utf8(bad + "y").size());
  }
}

}  // namespace
}  // namespace fathom
