// A Python of the machine, for checks against programs that are written in it. Where there is none, a test
// says so and skips.
#pragma once

#include <cstdlib>
#include <string>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "tests/io/temp.h"

namespace fathom::testing {

/// One that has these modules ("torch, h5py"): FATHOM_PYTHON names it, otherwise python3 is tried.
class Python {
 public:
  explicit Python(const std::string& modules) {
    const char* named = std::getenv("FATHOM_PYTHON");
    program_ = named != nullptr ? named : "python3";
    has_modules_ = std::system((program_ + " -c 'import " + modules + "' >/dev/null 2>&1").c_str()) == 0;
    if (!has_modules_)
      why_not_ = program_ + " does not import " + modules + " (FATHOM_PYTHON names another Python)";
  }

  explicit operator bool() const { return has_modules_; }
  const std::string& why_not() const { return why_not_; }

  /// What a script of tests/golden prints.
  nlohmann::json says(const TempFolder& folder, const std::string& script,
                      const std::string& arguments) const {
    const std::string out = folder / "says.json";
    const std::string command = "PYTHONDONTWRITEBYTECODE=1 " + program_ +
                                " " FATHOM_SOURCE_DIR "/tests/golden/" + script + " " + arguments + " > " +
                                out;
    EXPECT_EQ(std::system((command + " 2>/dev/null").c_str()), 0) << command;
    return nlohmann::json::parse(read_bytes(out));
  }

 private:
  std::string program_, why_not_;
  bool has_modules_ = false;
};

}  // namespace fathom::testing
