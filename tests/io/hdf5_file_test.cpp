#include "src/io/hdf5_file.h"

#include <chrono>
#include <csignal>
#include <numeric>
#include <random>

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include "src/io/atomic_file.h"
#include "tests/io/temp.h"

namespace fathom {
namespace {

using testing::expect_user_error;
using testing::read_bytes;
using testing::TempFolder;
using testing::write_bytes;

void write_sample(const std::string& path, float first = 1.0F) {
  H5Writer out(path, kCheckpointKind);
  const std::vector<float> weights = {first, 2, 3, 4, 5, 6};
  out.write<float>("params/model.norm.weight", weights, {2, 3});
  const std::vector<std::int64_t> cursor = {7};
  out.write<std::int64_t>("cursor", cursor);
  out.write_text("config", "seed: 1\n");
  out.set_string("name", "d2");
  out.set_int("step", 12);
  out.set_double("lr", 0.25, "params/model.norm.weight");
  out.commit();
}

TEST(H5File, EverythingWrittenIsRead) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  write_sample(path);
  const H5Reader in(path, kCheckpointKind);
  EXPECT_EQ(in.read<float>("params/model.norm.weight"), (std::vector<float>{1, 2, 3, 4, 5, 6}));
  EXPECT_EQ(in.dims("params/model.norm.weight"), (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(in.read<std::int64_t>("cursor"), std::vector<std::int64_t>{7});
  EXPECT_EQ(in.read_text("config"), "seed: 1\n");
  EXPECT_EQ(in.get_string("name"), "d2");
  EXPECT_EQ(in.get_int("step"), 12);
  EXPECT_EQ(in.get_double("lr", "params/model.norm.weight"), 0.25);
  EXPECT_EQ(in.list(), (std::vector<std::string>{"config", "cursor", "params"}));
  EXPECT_EQ(in.list("params"), (std::vector<std::string>{"model.norm.weight"}));
  EXPECT_TRUE(in.has("params/model.norm.weight"));
  EXPECT_FALSE(in.has("params/absent"));
  EXPECT_FALSE(in.has("absent/absent"));
  EXPECT_TRUE(in.has_attribute("step"));
  EXPECT_FALSE(in.has_attribute("absent"));
  std::vector<float> row(3);
  in.read_rows<float>("params/model.norm.weight", 1, row);
  EXPECT_EQ(row, (std::vector<float>{4, 5, 6}));
  EXPECT_THROW(in.read_rows<float>("params/model.norm.weight", 2, row), InternalError);
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
}

template <typename T>
class H5Types : public ::testing::Test {};
using Types = ::testing::Types<float, double, std::int32_t, std::int64_t, std::uint8_t, std::uint16_t,
                               std::uint32_t, std::uint64_t>;
TYPED_TEST_SUITE(H5Types, Types);

TYPED_TEST(H5Types, RoundTripWholeAndStreamed) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  std::vector<TypeParam> values(1000);
  std::iota(values.begin(), values.end(), TypeParam{0});
  {
    H5Writer out(path, kCheckpointKind);
    out.write<TypeParam>("whole", values);
    out.write<TypeParam>("empty", {});
    out.create_stream<TypeParam>("stream", 64);
    for (std::size_t done = 0, n = 1; done < values.size(); n = n * 2 + 1) {
      const std::size_t take = std::min(n, values.size() - done);
      out.append<TypeParam>("stream", std::span<const TypeParam>(values).subspan(done, take));
      done += take;
    }
    out.commit();
  }
  const H5Reader in(path, kCheckpointKind);
  EXPECT_EQ(in.read<TypeParam>("whole"), values);
  EXPECT_EQ(in.read<TypeParam>("stream"), values);
  EXPECT_TRUE(in.read<TypeParam>("empty").empty());
  std::vector<TypeParam> part(100);
  in.read_rows<TypeParam>("stream", 60, part);
  EXPECT_TRUE(std::equal(part.begin(), part.end(), values.begin() + 60));
}

TEST(H5File, EqualContentGivesEqualBytes) {
  const TempFolder folder;
  write_sample(folder / "a.h5");
  write_sample(folder / "b.h5");
  EXPECT_EQ(read_bytes(folder / "a.h5"), read_bytes(folder / "b.h5"));
}

TEST(H5File, WithoutCommitNothingChanges) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  write_sample(path);
  const std::string before = read_bytes(path);
  {
    H5Writer out(path, kCheckpointKind);
    out.set_int("step", 99);
  }
  EXPECT_EQ(read_bytes(path), before);
  EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
}

TEST(H5File, ALeftTemporaryIsOverwrittenAndALockedOneRefused) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  write_bytes(path + ".tmp", std::string(100000, 'x'));
  H5Writer first(path, kCheckpointKind);
  expect_user_error([&] { H5Writer second(path, kCheckpointKind); }, {path, "another process", "locked"});
  first.set_int("step", 1);
  first.commit();
  EXPECT_EQ(H5Reader(path, kCheckpointKind).get_int("step"), 1);
}

TEST(H5File, SaysWhatAFileIsInstead) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  const auto open = [&] { H5Reader in(path, kTokenStoreKind); };
  expect_user_error(open, {path, "No such file"});
  write_bytes(path, "");
  expect_user_error(open, {path, "is empty"});
  write_bytes(path, "once upon a time");
  expect_user_error(open, {path, "not a Fathom file", "expected a token store"});
  write_bytes(path, "FATHOM\r\n\x1a and no more");
  expect_user_error(open, {path, "truncated", "21"});
  std::filesystem::remove(path);
  write_sample(path);
  write_bytes(path, read_bytes(path).substr(kH5UserBlockSize));  // what follows the block is plain HDF5
  expect_user_error(open, {path, "is an HDF5 file but not one of Fathom's"});
  expect_user_error([&] { write_sample(path); }, {path, "not a checkpoint", "another path"});
  std::filesystem::remove(path);
  write_sample(path);
  expect_user_error([&] { H5Writer out(path, kTokenStoreKind); }, {path, "not a token store"});
  expect_user_error(open, {path, "is a checkpoint, expected a token store"});
  std::filesystem::create_directory(folder / "folder");
  expect_user_error([&] { H5Reader in(folder / "folder", kTokenStoreKind); }, {"not a regular file"});
}

TEST(H5File, NoticesDamage) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  const auto open = [&] { H5Reader in(path, kCheckpointKind); };
  write_sample(path);
  const std::string good = read_bytes(path);
  write_bytes(path, good.substr(0, good.size() - 1));
  expect_user_error(open, {path, "truncated", std::to_string(good.size()), std::to_string(good.size() - 1)});
  write_bytes(path, good + "x");
  expect_user_error(open, {path, "trailing", std::to_string(good.size() + 1)});
  std::string bad = good;
  bad[good.size() / 2] = static_cast<char>(bad[good.size() / 2] ^ 1);
  write_bytes(path, bad);
  expect_user_error(open, {path, "damaged", "checksum"});
  bad = good;
  bad[40] = static_cast<char>(bad[40] ^ 1);
  write_bytes(path, bad);
  expect_user_error(open, {path, "header", "damaged"});
  bad = good;
  std::swap(bad[100], bad[110]);  // two zero bytes of the padding
  bad[300] = 'x';
  write_bytes(path, bad);
  expect_user_error(open, {path, "header", "damaged"});
}

TEST(H5File, WrongTypesShapesAndNamesAreUserErrors) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  write_sample(path);
  const H5Reader in(path, kCheckpointKind);
  expect_user_error([&] { in.read<double>("params/model.norm.weight"); }, {path, "does not hold float64"});
  expect_user_error([&] { in.read<float>("absent"); }, {path, "no dataset absent"});
  expect_user_error([&] { in.read<float>("params"); }, {path, "params", "not a dataset"});
  expect_user_error([&] { in.list("absent"); }, {path, "no group absent"});
  expect_user_error([&] { in.list("cursor"); }, {path, "not a group"});
  std::vector<float> five(5);
  expect_user_error([&] { in.read_into<float>("params/model.norm.weight", five); },
                    {path, "[2, 3]", "5 elements"});
  expect_user_error([&] { in.get_int("absent"); }, {path, "no attribute absent"});
  expect_user_error([&] { in.get_int("name"); }, {path, "not one int64"});
  expect_user_error([&] { in.get_string("step"); }, {path, "not a string"});
}

TEST(H5File, UnwritablePlaces) {
  const TempFolder folder;
  expect_user_error([&] { H5Writer out(folder / "no/such/a.h5", kCheckpointKind); },
                    {"no/such", "does not exist"});
  expect_user_error([&] { H5Writer out(folder.path(), kCheckpointKind); },
                    {folder.path(), "not a regular file"});
  expect_user_error([&] { H5Writer out("/proc/a.h5", kCheckpointKind); }, {"/proc/a.h5"});
}

// The limit on the size of files stands in for a full disk: write(2) fails with EFBIG at the same places
// where it would fail with ENOSPC. It runs in a child, since the limit holds for the whole process.
TEST(H5File, AFullDiskAnywhereLeavesThePreviousFile) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  write_sample(path, 42.0F);
  const std::string before = read_bytes(path);
  for (const rlim_t limit : {rlim_t{0}, rlim_t{100}, rlim_t{512}, rlim_t{600}, rlim_t{2048}, rlim_t{5000},
                             rlim_t{20000}, rlim_t{70000}, rlim_t{200000}, rlim_t{900000}}) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      std::signal(SIGXFSZ, SIG_IGN);
      const rlimit size{limit, limit};
      ::setrlimit(RLIMIT_FSIZE, &size);
      int status = 1;
      try {
        H5Writer out(path, kCheckpointKind);
        const std::vector<float> big(100000, 1.0F);
        out.write<float>("a/big", big);
        out.create_stream<float>("stream", 10000);
        for (int i = 0; i < 13; ++i) out.append<float>("stream", std::span(big).first(10001));
        out.commit();
      } catch (const UserError& e) {
        const std::string message = e.what();
        status =
            message.find(path) != std::string::npos && message.find("File too large") != std::string::npos
                ? 0
                : 2;
      }
      std::exit(status);  // exit, not _exit: the library's clean-up must not crash either
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status) << " at limit " << limit;
    EXPECT_EQ(WEXITSTATUS(status), 0) << "limit " << limit;
    EXPECT_EQ(read_bytes(path), before) << "limit " << limit;
    EXPECT_FALSE(std::filesystem::exists(path + ".tmp"));
  }
}

// A process that is killed in a loop of commits leaves the old file or the new one, never something else.
TEST(H5File, KillingAWriterLeavesACompleteFile) {
  const TempFolder folder;
  const std::string path = folder / "a.h5";
  const auto commit = [&](std::int64_t version) {
    H5Writer out(path, kCheckpointKind);
    out.write<std::int64_t>("values", std::vector<std::int64_t>(20000, version));
    out.set_int("version", version);
    out.commit();
  };
  // The moments of the kills cover a few commits, however slow the disk is.
  const auto start = std::chrono::steady_clock::now();
  commit(0);
  const std::chrono::duration<double, std::micro> one = std::chrono::steady_clock::now() - start;
  std::mt19937 random(7);
  std::int64_t latest = 0;
  for (int round = 0; round < 25; ++round) {
    const pid_t child = ::fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      for (std::int64_t v = latest + 1;; ++v) commit(v);
    }
    ::usleep(static_cast<useconds_t>(std::uniform_real_distribution<double>(0, 6)(random) * one.count()) +
             500);
    ::kill(child, SIGKILL);
    ASSERT_EQ(::waitpid(child, nullptr, 0), child);
    const H5Reader in(path, kCheckpointKind);
    const std::int64_t version = in.get_int("version");
    EXPECT_GE(version, latest);
    EXPECT_EQ(in.read<std::int64_t>("values"), std::vector<std::int64_t>(20000, version));
    latest = version;
  }
  EXPECT_GT(latest, 0) << "no round was long enough to commit";
}

}  // namespace
}  // namespace fathom
