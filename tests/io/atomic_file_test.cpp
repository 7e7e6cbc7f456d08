// Files that are complete or absent.
#include "src/io/atomic_file.h"

#include <filesystem>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/error.h"

namespace fathom {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

fs::path fresh_folder(const char* name) {
  fs::path folder = fs::path(::testing::TempDir()) / name;
  fs::remove_all(folder);
  fs::create_directories(folder);
  return folder;
}

TEST(AtomicFile, ReplacesTheWholeFileAndLeavesNothingElse) {
  const fs::path folder = fresh_folder("atomic_replace");
  const std::string path = (folder / "f").string();
  write_file(path, "a long first version");
  write_file(path, "short");
  EXPECT_EQ(read_file(path, "file"), "short");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder), {}), 1);
}

TEST(AtomicFile, WithoutCommitNothingChanges) {
  const fs::path folder = fresh_folder("atomic_abandon");
  const std::string path = (folder / "f").string();
  write_file(path, "kept");
  { AtomicFile(path).write("half of the new"); }
  EXPECT_EQ(read_file(path, "file"), "kept");
  EXPECT_EQ(std::distance(fs::directory_iterator(folder), {}), 1);
}

TEST(AtomicFile, SaysWhichFolderIsMissing) {
  const fs::path path = fresh_folder("atomic_missing") / "no" / "f";
  try {
    write_file(path.string(), "x");
    FAIL() << "a missing folder was accepted";
  } catch (const UserError& e) {
    EXPECT_THAT(e.what(), HasSubstr("does not exist"));
    EXPECT_THAT(e.what(), HasSubstr(path.parent_path().string()));
  }
}

}  // namespace
}  // namespace fathom
