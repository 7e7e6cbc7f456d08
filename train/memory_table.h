// What a training takes of the machine's memory, said before it takes it.
#pragma once

#include <cstdint>
#include <string>

#include "src/autograd/context.h"
#include "src/config/config.h"

namespace fathom {

/// Memory that a training may take, in bytes.
struct MemoryRoom {
  double total = 0;   // the machine's or the GPU's; 0: unknown
  double others = 0;  // what other programs hold of it
  bool gpu = false;
};

/// Empty when `needed` bytes, which are an estimate, fit; else a sentence that says they do not. UserError,
/// which begins with `table`, when a GPU surely has too few.
std::string shortage(const std::string& table, double needed, const MemoryRoom& room);

/// What is allocated by now and what the steps will take, in a line; with a hint when the machine's
/// `total_memory` bytes (0: unknown), or those of a GPU that other programs leave, are fewer. UserError when
/// a GPU surely is too small. One of several ranks: `config` is its share of the work.
std::string memory_table(Context& c, const Config& config, std::int64_t total_memory, int ranks = 1);

}  // namespace fathom
