#include "src/core/allocator.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace fathom {

const char* name_of(MemoryTag tag) {
  switch (tag) {
    case MemoryTag::Parameters:
      return "parameters";
    case MemoryTag::Gradients:
      return "gradients";
    case MemoryTag::Optimizer:
      return "optimizer";
    case MemoryTag::Activations:
      return "activations";
    case MemoryTag::Workspace:
      return "workspace";
    case MemoryTag::Data:
      return "data";
  }
  return "?";
}

namespace {

// Up to eight sizes between powers of two: causal evaluation asks for a new size with every batch, and
// rounding lets it reuse blocks at a waste of at most an eighth.
std::size_t size_class(std::size_t bytes) {
  constexpr std::size_t kSmallest = 256;
  if (bytes <= kSmallest) return kSmallest;
  std::size_t power = kSmallest;
  while (power * 2 <= bytes) power *= 2;
  const std::size_t step = power / 8;
  return (bytes + step - 1) / step * step;
}

}  // namespace

struct Allocator::State {
  std::shared_ptr<Backend> backend;
  std::mutex mutex;
  MemoryUse use;
  std::unordered_map<std::size_t, std::vector<void*>> free_blocks;

  ~State() { release_cache(); }

  void release_cache() {
    for (auto& [bytes, blocks] : free_blocks) {
      for (void* block : blocks) backend->release(block, bytes);
    }
    free_blocks.clear();
    use.cached = 0;
  }
};

Allocator::Allocator(std::shared_ptr<Backend> backend) : state_(std::make_shared<State>()) {
  state_->backend = std::move(backend);
}

Storage Allocator::allocate(std::size_t bytes, MemoryTag tag) {
  const std::size_t size = size_class(bytes);
  const auto t = static_cast<std::size_t>(tag);
  void* block = nullptr;
  {
    const std::lock_guard lock(state_->mutex);
    auto& blocks = state_->free_blocks[size];
    if (!blocks.empty()) {
      block = blocks.back();
      blocks.pop_back();
      state_->use.cached -= size;
    } else {
      try {
        block = state_->backend->allocate(size);
      } catch (const std::bad_alloc&) {
        state_->release_cache();
        block = state_->backend->allocate(size);
      }
    }
    MemoryUse& use = state_->use;
    use.now[t] += size;
    use.total_now += size;
    use.peak[t] = std::max(use.peak[t], use.now[t]);
    use.total_peak = std::max(use.total_peak, use.total_now);
  }
  return {block, [state = state_, size, t](void* p) {
            const std::lock_guard lock(state->mutex);
            state->use.now[t] -= size;
            state->use.total_now -= size;
            state->use.cached += size;
            state->free_blocks[size].push_back(p);
          }};
}

MemoryUse Allocator::use() const {
  const std::lock_guard lock(state_->mutex);
  return state_->use;
}

void Allocator::reset_peak() {
  const std::lock_guard lock(state_->mutex);
  state_->use.peak = state_->use.now;
  state_->use.total_peak = state_->use.total_now;
}

void Allocator::release_cache() {
  const std::lock_guard lock(state_->mutex);
  state_->release_cache();
}

}  // namespace fathom
