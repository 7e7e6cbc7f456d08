#include "train/memory_table.h"

#include <algorithm>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/core/units.h"
#include "src/flops/flops.h"

namespace fathom {

namespace {

MemoryRoom room_of(Context& c, std::int64_t total_memory) {
  const Backend& backend = c.backend();
  MemoryRoom room{.total = static_cast<double>(total_memory), .others = 0, .gpu = !backend.is_cpu()};
  if (const std::int64_t free = backend.free_memory_bytes(); free > 0) {
    const MemoryUse use = c.allocator().use();
    const double ours =
        static_cast<double>(use.total_now + use.cached) + static_cast<double>(backend.workspace_bytes());
    room.others = std::max(0.0, room.total - static_cast<double>(free) - ours);
  }
  return room;
}

}  // namespace

std::string shortage(const std::string& table, double needed, const MemoryRoom& room) {
  const double left = room.total - room.others;
  if (room.total <= 0 || needed <= left) return "";
  const char* device = room.gpu ? "GPU" : "machine";
  const std::string more =
      room.others > 0 ? fmt::format(
                            "That is more than the {} that other programs and the driver leave of this "
                            "{}'s {}",
                            format_bytes(left), device, format_bytes(room.total))
                      : fmt::format("That is more than this {}'s {}", device, format_bytes(room.total));
  const std::string hint = "lower train.micro_batch or set train.recompute: block";
  // A machine may swap; a GPU does not, and the estimate is within a tenth.
  constexpr double kMargin = 1.1;
  if (room.gpu && needed > kMargin * left) {
    throw UserError(fmt::format("{}. {}.", table, more),
                    fmt::format("To train this, {}{}.", hint,
                                room.others > 0 ? ", or free the GPU (nvidia-smi lists who holds it)" : ""));
  }
  return fmt::format(". {}: {}", more, hint);
}

std::string memory_table(Context& c, const Config& config, std::int64_t total_memory, int ranks) {
  const MemoryUse use = c.allocator().use();
  MemoryEstimate estimate = estimate_memory(config, {c.backend().head_chunk_rows(), !c.backend().is_cpu()});
  estimate.optimizer /= ranks;  // each has its own part of the moments (train/shards.h)
  if (ranks > 1 && config.train.reduction == "bf16") {
    constexpr double kBf16OfFp32 = 0.5;
    estimate.gradients *= 1 + kBf16OfFp32;
  }
  std::string table = "Memory: ";
  for (const MemoryTag tag : {MemoryTag::Parameters, MemoryTag::Gradients, MemoryTag::Optimizer}) {
    table += fmt::format("{} {}, ", name_of(tag),
                         format_bytes(static_cast<double>(use.now[static_cast<std::size_t>(tag)])));
  }
  table += fmt::format("activations about {}, head about {}", format_bytes(estimate.activations),
                       format_bytes(estimate.logits_chunk));
  if (estimate.workspace > 0) table += fmt::format(", ops' own about {}", format_bytes(estimate.workspace));
  if (estimate.evaluation > 0)
    table += fmt::format(", evaluation about {}", format_bytes(estimate.evaluation));
  return table + shortage(table, estimate.total(), room_of(c, total_memory));
}

}  // namespace fathom
