#include "src/core/build_info.h"

#include <algorithm>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "fathom_git_sha.h"  // written at build time (cmake/FathomBuildInfo.cmake)

namespace fathom {
namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> out;
  std::size_t begin = 0;
  while (begin < list.size()) {
    const std::size_t end = std::min(list.find(' ', begin), list.size());
    out.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return out;
}

}  // namespace

const BuildInfo& build_info() {
  static const BuildInfo info{
      .version = FATHOM_BUILD_VERSION,
      .git_sha = FATHOM_BUILD_GIT_SHA,
      .compiler = FATHOM_BUILD_COMPILER,
      .build_type = FATHOM_BUILD_TYPE,
      .instruction_sets = split(FATHOM_BUILD_ISAS),
      .sanitizers = FATHOM_BUILD_SANITIZERS,
      .cuda = FATHOM_BUILD_CUDA != 0,
  };
  return info;
}

std::string describe_build() {
  const BuildInfo& b = build_info();
  // Twelve digits name a commit; the mark of changed files stays.
  const std::string sha = b.git_sha.size() < 40 ? b.git_sha : b.git_sha.substr(0, 12) + b.git_sha.substr(40);
  return fmt::format("{} ({}, {}, {}{}; CPU: {}{})", b.version, sha, b.compiler, b.build_type,
                     b.sanitizers.empty() ? "" : ", sanitizers: " + b.sanitizers,
                     fmt::join(b.instruction_sets, " "), b.cuda ? "; CUDA" : "");
}

}  // namespace fathom
