// Memory of a device, handed out by tag. Blocks that come back are kept for the next request of their size,
// so a training step allocates from the system once and from the cache ever after.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "kernels/backend.h"

namespace fathom {

/// What memory is for; the start-up table and the out-of-memory message list it by these.
enum class MemoryTag : std::uint8_t { Parameters, Gradients, Optimizer, Activations, Workspace, Data };
inline constexpr std::size_t kMemoryTags = 6;
const char* name_of(MemoryTag tag);

/// A block of device memory that goes back to its allocator's cache when the last owner lets go.
using Storage = std::shared_ptr<void>;

struct MemoryUse {
  std::array<std::size_t, kMemoryTags> now{};   // bytes in use
  std::array<std::size_t, kMemoryTags> peak{};  // each tag's own highest value
  std::size_t total_now = 0;
  std::size_t total_peak = 0;
  std::size_t cached = 0;  // held for reuse, not in use
};

class Allocator {
 public:
  explicit Allocator(std::shared_ptr<Backend> backend);

  /// Another cache of blocks over the same accounts: its blocks are never lent to anybody else and never
  /// given back while it lives. For work that was captured with their addresses.
  Allocator pool() const;

  /// Uninitialised memory, 64-byte aligned. Sizes are rounded up so that similar requests share blocks.
  /// UserError when the device has no more: what is held, by tag, and what to do.
  Storage allocate(std::size_t bytes, MemoryTag tag);
  MemoryUse use() const;
  void reset_peak();
  /// Gives cached blocks back to the system.
  void release_cache();

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace fathom
