// What a training takes of the machine's memory, said before it takes it.
#pragma once

#include <cstdint>
#include <string>

#include "src/autograd/context.h"
#include "src/config/config.h"

namespace fathom {

/// What is allocated by now and what the steps will take, in a line; with a hint when the machine's
/// `total_memory` bytes (0: unknown) are fewer. UserError when a GPU surely is too small.
std::string memory_table(Context& c, const Config& config, std::int64_t total_memory);

}  // namespace fathom
