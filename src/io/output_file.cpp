#include "src/io/output_file.h"

#include <filesystem>
#include <fstream>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/io/atomic_file.h"

namespace fathom {

namespace fs = std::filesystem;

void require_no_input(std::string_view flag, const std::string& output, std::span<const std::string> inputs) {
  for (const std::string& input : inputs) {
    for (const std::string& written : {output, AtomicFile::temporary_of(output)}) {
      std::error_code error;  // one of the two does not exist
      if (!fs::equivalent(written, input, error)) continue;
      throw UsageError(fmt::format("{} {} would overwrite {}, which is an input.", flag, output, input),
                       "Write to another path.");
    }
  }
}

void require_replaceable(const std::string& path, std::string_view kind,
                         const std::function<bool(const std::string&)>& is_of_kind) {
  std::error_code error;
  if (!fs::is_regular_file(path, error) || fs::is_empty(path, error) || is_of_kind(path)) return;
  throw UserError(fmt::format("cannot write {}: the file there is not {} and would be lost.", path, kind),
                  "Write to another path, or remove it first.");
}

std::string start_of_file(const std::string& path, std::size_t bytes) {
  std::string text(bytes, '\0');
  std::ifstream in(path, std::ios::binary);
  in.read(text.data(), static_cast<std::streamsize>(bytes));
  text.resize(static_cast<std::size_t>(in.gcount()));
  return text;
}

}  // namespace fathom
