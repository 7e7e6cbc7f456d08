// What stands where a command is about to write: never one of its inputs, never a file of another kind.
#pragma once

#include <functional>
#include <span>
#include <string>
#include <string_view>

namespace fathom {

/// UsageError when writing `output`, which `flag` gave, would replace one of `inputs`: it is the same file,
/// by whatever name or link, or has the name of the temporary that becomes `output`. Inputs that do not exist
/// are left to their readers.
void require_no_input(std::string_view flag, const std::string& output, std::span<const std::string> inputs);

/// UserError when a file that is not empty stands at `path` and `is_of_kind` is false of it. `kind` names the
/// kind with its article, such as "a token store". What is no regular file is left to the writer.
void require_replaceable(const std::string& path, std::string_view kind,
                         const std::function<bool(const std::string&)>& is_of_kind);

/// Up to `bytes` from the start of the file; empty when it cannot be read.
std::string start_of_file(const std::string& path, std::size_t bytes);

}  // namespace fathom
