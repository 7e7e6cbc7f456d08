// A folder of its own for a test, removed at its end, and a check of error messages.
#pragma once

#include <atomic>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <sstream>
#include <string>
#include <string_view>

#include <gtest/gtest.h>
#include <unistd.h>

#include "kernels/error.h"

namespace fathom::testing {

class TempFolder {
 public:
  TempFolder() {
    static std::atomic<int> count{0};
    path_ = std::filesystem::path(::testing::TempDir()) /
            ("fathom_io_" + std::to_string(::getpid()) + "_" + std::to_string(count++));
    std::filesystem::create_directories(path_);
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;

  std::string operator/(std::string_view name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

inline void write_bytes(const std::string& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

inline std::string read_bytes(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

/// `call` must throw a UserError whose message has every one of `words`.
template <typename Call>
void expect_user_error(Call&& call, std::initializer_list<std::string> words) {
  try {
    call();
  } catch (const UserError& e) {
    for (const std::string& word : words) {
      EXPECT_NE(std::string_view(e.what()).find(word), std::string_view::npos)
          << "\"" << word << "\" is missing in: " << e.what();
    }
    return;
  } catch (const std::exception& e) {
    ADD_FAILURE() << "expected a UserError, got: " << e.what();
    return;
  }
  ADD_FAILURE() << "expected a UserError, nothing was thrown";
}

}  // namespace fathom::testing
