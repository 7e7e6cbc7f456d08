// How much memory the system lets this process have: in a container, less than the machine has.
#pragma once

#include <cstdint>
#include <string>

namespace fathom {

/// The least limit in bytes that the control groups of this process set, its own and those that they lie in:
/// memory.max (version 2) and memory.limit_in_bytes (version 1). 0 when there is none, or none can be read.
/// `root` is the folder that holds proc and sys.
std::int64_t memory_limit(const std::string& root = "/");

}  // namespace fathom
