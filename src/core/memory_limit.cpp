#include "src/core/memory_limit.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <fstream>
#include <string_view>

namespace fathom {

namespace {

namespace fs = std::filesystem;

// The smaller of `limit` and the number in the file. "max" is no limit, nor is a file that is not there.
void lower_to(std::int64_t& limit, const fs::path& path) {
  std::ifstream file(path);
  std::string word;
  if (!(file >> word)) return;
  std::int64_t bytes = 0;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), bytes);
  // Version 1 writes the largest multiple of a page for no limit.
  constexpr std::int64_t kUnlimited = std::int64_t{1} << 62;
  if (error != std::errc() || end != word.data() + word.size() || bytes < 1 || bytes >= kUnlimited) return;
  limit = limit == 0 ? bytes : std::min(limit, bytes);
}

// Of `group` below `mount`, and of all groups that it lies in. In a container the path may be the one outside
// of it, and the container's own group the mount itself: what is not there is passed over.
void lower_to_groups(std::int64_t& limit, const fs::path& mount, fs::path group, const char* file) {
  const bool outside = std::find(group.begin(), group.end(), "..") != group.end();
  while (!outside && group.has_relative_path()) {
    lower_to(limit, mount / group.relative_path() / file);
    group = group.parent_path();
  }
  lower_to(limit, mount / file);
}

bool has_memory(std::string_view controllers) {
  while (!controllers.empty()) {
    const std::size_t end = std::min(controllers.find(','), controllers.size());
    if (controllers.substr(0, end) == "memory") return true;
    controllers.remove_prefix(std::min(end + 1, controllers.size()));
  }
  return false;
}

}  // namespace

std::int64_t memory_limit(const std::string& root) {
  const fs::path mounts = fs::path(root) / "sys/fs/cgroup";
  std::int64_t limit = 0;
  std::ifstream groups(fs::path(root) / "proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {  // NUMBER:CONTROLLERS:PATH
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string_view controllers = std::string_view(line).substr(first + 1, second - first - 1);
    const fs::path group = line.substr(second + 1);
    if (has_memory(controllers)) {
      lower_to_groups(limit, mounts / "memory", group, "memory.limit_in_bytes");
    } else if (controllers.empty()) {
      lower_to_groups(limit, mounts, group, "memory.max");
      lower_to_groups(limit, mounts / "unified", group, "memory.max");  // beside version 1
    }
  }
  return limit;
}

}  // namespace fathom
