#include "train/memory_table.h"

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/core/units.h"
#include "src/flops/flops.h"

namespace fathom {

std::string memory_table(Context& c, const Config& config, std::int64_t total_memory) {
  const MemoryUse use = c.allocator().use();
  const MemoryEstimate estimate = estimate_memory(config, c.backend().head_chunk_rows());
  std::string table = "Memory: ";
  for (const MemoryTag tag : {MemoryTag::Parameters, MemoryTag::Gradients, MemoryTag::Optimizer}) {
    table += fmt::format("{} {}, ", name_of(tag),
                         format_bytes(static_cast<double>(use.now[static_cast<std::size_t>(tag)])));
  }
  table += fmt::format("activations about {}, head about {}", format_bytes(estimate.activations),
                       format_bytes(estimate.logits_chunk));
  const auto there = static_cast<double>(total_memory);
  if (there <= 0 || estimate.total() <= there) return table;
  const bool machine = c.backend().is_cpu();
  const std::string more =
      fmt::format("That is more than this {}'s {}", machine ? "machine" : "GPU", format_bytes(there));
  const std::string hint = "lower train.micro_batch or set train.recompute: block";
  // A machine may swap; a GPU does not, and the estimate is within a tenth.
  constexpr double kMargin = 1.1;
  if (!machine && estimate.total() > kMargin * there) {
    throw UserError(fmt::format("{}. {}.", table, more), fmt::format("To train this, {}.", hint));
  }
  return table + fmt::format(". {}: {}", more, hint);
}

}  // namespace fathom
