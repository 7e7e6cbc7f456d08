#include "src/io/safetensors.h"

#include <array>
#include <cstring>
#include <numeric>

#include <gtest/gtest.h>

#include "tests/io/mutate.h"
#include "tests/io/temp.h"

namespace fathom {
namespace {

using testing::expect_user_error;
using testing::fuzz_inputs;
using testing::Mutator;
using testing::read_bytes;
using testing::TempFolder;
using testing::write_bytes;

/// A file with this header, and `data_bytes` bytes after it.
std::string file_of(const std::string& header, std::size_t data_bytes) {
  std::uint64_t length = header.size();
  std::string bytes(sizeof length, '\0');
  std::memcpy(bytes.data(), &length, sizeof length);
  return bytes + header + std::string(data_bytes, 'x');
}

template <typename T>
std::span<const std::byte> bytes_of(const T& values) {
  return std::as_bytes(std::span(values));
}

void write_sample(const std::string& path) {
  const std::array<float, 6> matrix = {1, 2, 3, 4, 5, 6};
  const std::array<std::uint16_t, 2> halves = {0x3f80, 0xc000};  // 1 and -2 in bf16
  SafetensorsWriter out(path,
                        {{"b", SafetensorsType::F32, {2, 3}},
                         {"a", SafetensorsType::BF16, {2}},
                         {"none", SafetensorsType::F32, {0, 4}},
                         {"scalar", SafetensorsType::U8, {}}},
                        {{"format", "pt"}});
  out.write("b", bytes_of(matrix));
  out.write("a", bytes_of(halves));
  out.write("none", {});
  out.write("scalar", bytes_of(std::array<std::uint8_t, 1>{7}));
  out.commit();
}

TEST(Safetensors, WhatIsWrittenIsRead) {
  const TempFolder folder;
  write_sample(folder / "x.safetensors");
  const SafetensorsFile file(folder / "x.safetensors");
  EXPECT_EQ(file.metadata(), (SafetensorsMetadata{{"format", "pt"}}));
  ASSERT_EQ(file.entries().size(), 4U);
  EXPECT_EQ(file.entries()[0].name, "b");
  ASSERT_NE(file.find("b"), nullptr);
  EXPECT_EQ(file.find("b")->shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(file.find("scalar")->elements(), 1);
  EXPECT_EQ(file.find("c"), nullptr);
  std::array<float, 6> matrix{};
  ASSERT_EQ(file.data("b").size(), sizeof matrix);
  std::memcpy(matrix.data(), file.data("b").data(), sizeof matrix);
  EXPECT_EQ(matrix, (std::array<float, 6>{1, 2, 3, 4, 5, 6}));
  EXPECT_TRUE(file.data("none").empty());
  EXPECT_EQ(static_cast<int>(file.data("scalar")[0]), 7);
  EXPECT_THROW(file.data("c"), InternalError);
}

// The bytes themselves, as other programs read and write them (the same header from the Python package, keys
// in another order).
TEST(Safetensors, TheFileIsTheFormats) {
  const TempFolder folder;
  const std::string path = folder / "x.safetensors";
  {
    SafetensorsWriter out(path, {{"w", SafetensorsType::U8, {2}}});
    out.write("w", bytes_of(std::array<std::uint8_t, 2>{'x', 'x'}));
    out.commit();
  }
  EXPECT_EQ(read_bytes(path), file_of(R"({"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}   )", 2));
  write_bytes(path, file_of(R"({"w":{"data_offsets":[0,2],"dtype":"U8","shape":[2]}} )", 2));
  EXPECT_EQ(SafetensorsFile(path).entries().at(0).bytes(), 2U);
}

TEST(Safetensors, AnEarlierFileStaysWithoutCommit) {
  const TempFolder folder;
  const std::string path = folder / "x.safetensors";
  write_sample(path);
  const std::string before = read_bytes(path);
  {
    SafetensorsWriter out(path, {{"w", SafetensorsType::U8, {2}}});
    EXPECT_THROW(out.write("v", {}), InternalError);
    EXPECT_THROW(out.write("w", {}), InternalError);
    EXPECT_THROW(out.commit(), InternalError);
  }
  EXPECT_EQ(read_bytes(path), before);
  EXPECT_THROW(SafetensorsWriter(path, {{"w", SafetensorsType::U8, {2}}, {"w", SafetensorsType::U8, {2}}}),
               InternalError);
}

TEST(Safetensors, LyingHeadersAreRefused) {
  const TempFolder folder;
  const std::string path = folder / "x.safetensors";
  const auto refused = [&](const std::string& bytes, std::initializer_list<std::string> words) {
    write_bytes(path, bytes);
    expect_user_error([&] { SafetensorsFile file(path); }, words);
  };
  const auto tensor = [](const std::string& type, const std::string& shape, const std::string& range) {
    return R"({"w":{"dtype":")" + type + R"(","shape":)" + shape + R"(,"data_offsets":)" + range + "}}";
  };
  refused("", {path, "0 bytes"});
  refused("abcd", {path, "4 bytes"});
  refused(std::string("\xff\xff\xff\xff\xff\xff\xff\xff{}", 10), {"header would be of"});
  refused(file_of("{}", 0).substr(0, 9), {"ends before"});
  refused(file_of("{", 0), {"no JSON"});
  refused(file_of("[1]", 0), {"no JSON object"});
  refused(file_of(std::string(100000, '['), 0), {"nested"});
  refused(file_of("{}", 3), {"bytes 0 to 3", "no tensor"});
  refused(file_of(tensor("U8", "[2]", "[0,2]"), 1), {"\"w\"", "cut off"});
  refused(file_of(tensor("U8", "[2]", "[1,3]"), 3), {"bytes 0 to 1", "no tensor"});
  refused(file_of(tensor("U8", "[2]", "[2,0]"), 2), {"\"w\"", "2 to 0"});
  refused(file_of(tensor("F32", "[2]", "[0,2]"), 2), {"\"w\"", "2 bytes", "need 8"});
  refused(file_of(tensor("F31", "[2]", "[0,2]"), 2), {"\"w\"", "dtype", "F31"});
  refused(file_of(tensor("U8", "[-2]", "[0,2]"), 2), {"\"w\"", "shape"});
  refused(file_of(tensor("U8", "[2.0]", "[0,2]"), 2), {"\"w\"", "shape"});
  refused(file_of(tensor("U8", "2", "[0,2]"), 2), {"\"w\"", "shape"});
  refused(file_of(tensor("U8", "[2]", "[0,2,4]"), 2), {"\"w\"", "data_offsets"});
  // 2^32 * 2^32 elements are none in 64 bits.
  refused(file_of(tensor("U8", "[4294967296,4294967296]", "[0,0]"), 0), {"\"w\"", "too large"});
  refused(file_of(tensor("F64", "[9223372036854775807]", "[0,0]"), 0), {"\"w\"", "too large"});
  refused(
      file_of(
          R"({"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})",
          2),
      {"\"w\"", "twice"});
  refused(
      file_of(
          R"({"v":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"w":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
          3),
      {"\"w\"", "overlaps"});
  refused(file_of(R"({"__metadata__":{"a":1}})", 0), {"__metadata__", "\"a\""});
  expect_user_error([&] { SafetensorsFile file(folder / "none"); }, {"none", "No such file"});
  expect_user_error([&] { SafetensorsFile file(folder.path()); }, {folder.path(), "directory"});
}

// A mutant may be a good file of other numbers; then all that it names lies within it.
TEST(Safetensors, MutantsAreRefusedOrWithinTheirFile) {
  const TempFolder folder;
  const std::string path = folder / "x.safetensors";
  write_sample(path);
  const std::string good = read_bytes(path);
  Mutator mutator(11);
  std::int64_t refused = 0;
  std::size_t sum = 0;
  const std::int64_t inputs = fuzz_inputs(2000);
  for (std::int64_t i = 0; i < inputs; ++i) {
    write_bytes(path, mutator.mutate(good));
    try {
      const SafetensorsFile file(path);
      std::size_t bytes = 0;
      for (const SafetensorsEntry& entry : file.entries()) {
        for (const std::byte b : file.data(entry.name)) sum += static_cast<std::size_t>(b);
        bytes += entry.bytes();
      }
      EXPECT_LE(bytes, good.size() + 64);
    } catch (const UserError&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, inputs / 4);
  EXPECT_GT(sum, 0U);
}

}  // namespace
}  // namespace fathom
