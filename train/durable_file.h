// Small files that are complete or absent, whatever happens while they are written.
#pragma once

#include <filesystem>
#include <string_view>

namespace fathom {

/// Replaces `path` by `bytes`, whole or not at all: temporary file beside it, fsync, rename, fsync of the
/// folder. UserError with path and reason when that fails; the old file is then as it was.
void write_file_durably(const std::filesystem::path& path, std::string_view bytes);

/// Writes all of `bytes` to an open file; `path` is for the UserError. Interrupted and short writes are
/// continued.
void write_fully(int fd, std::string_view bytes, const std::filesystem::path& path);

}  // namespace fathom
