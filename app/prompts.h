// Prompts to go on from, and the file that holds many of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fathom::app {

struct Prompt {
  std::string text;
  std::vector<std::int32_t> ids = {};  // when given as ids
  std::string error = {};              // FILE:LINE and why that line cannot be read; then there is no text
};

/// Those of a JSONL file, {"prompt": TEXT} a line, in its order; empty lines do not count. Lines that cannot
/// be read are among them, with their error. UserError when the file cannot be read, or none of its lines.
std::vector<Prompt> read_prompts(const std::string& path);

/// How many have no error.
std::size_t readable(const std::vector<Prompt>& prompts);

}  // namespace fathom::app
