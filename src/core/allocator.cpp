#include "src/core/allocator.h"

#include <algorithm>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#include <fmt/format.h>

#include "kernels/error.h"
#include "kernels/own_memory.h"
#include "src/core/units.h"

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

namespace {

struct Accounts {
  std::mutex mutex;
  MemoryUse use;
};

[[noreturn]] void out_of_memory(const Backend& backend, const MemoryUse& use, std::size_t bytes,
                                MemoryTag tag) {
  const auto size = [](auto n) { return format_bytes(static_cast<double>(n)); };
  std::string held;
  for (std::size_t t = 0; t < kMemoryTags; ++t) {
    if (use.now[t] == 0) continue;
    held += fmt::format("{}{} {}", held.empty() ? "" : ", ", name_of(static_cast<MemoryTag>(t)),
                        size(use.now[t]));
  }
  std::string there;
  if (backend.memory_bytes() > 0 && backend.free_memory_bytes() > 0) {
    there = fmt::format(" The device has {}, of which {} are free.", size(backend.memory_bytes()),
                        size(backend.free_memory_bytes()));
  }
  std::string of_ops;
  if (backend.workspace_bytes() > 0) of_ops = fmt::format("; ops' own {}", size(backend.workspace_bytes()));
  throw MemoryError(
      fmt::format("Out of memory: {} more for {} could not be had. In use: {} ({} in all; {} cached{}).{}",
                  size(bytes), name_of(tag), held.empty() ? "nothing" : held, size(use.total_now),
                  size(use.cached), of_ops, there),
      "Lower train.micro_batch (the batch stays the same), set train.recompute=block, or free the device of "
      "other programs; fathom plan says what a config needs.");
}

}  // namespace

// One lock, the accounts', for all pools of an allocator.
struct Allocator::State {
  std::shared_ptr<Backend> backend;
  std::shared_ptr<Accounts> accounts;
  std::shared_ptr<State> parent;  // null: this is the allocator itself, whose cache may be given back
  std::unordered_map<std::size_t, std::vector<void*>> free_blocks;

  ~State() { release_cache(); }

  void release_cache() {
    for (auto& [bytes, blocks] : free_blocks) {
      for (void* block : blocks) backend->release(block, bytes);
      accounts->use.cached -= bytes * blocks.size();
    }
    free_blocks.clear();
  }

  void* from_system(std::size_t size, MemoryTag tag) {
    try {
      return backend->allocate(size);
    } catch (const std::bad_alloc&) {
      (parent ? *parent : *this).release_cache();
    }
    try {
      return backend->allocate(size);
    } catch (const std::bad_alloc&) {
      out_of_memory(*backend, accounts->use, size, tag);
    }
  }
};

Allocator::Allocator(std::shared_ptr<Backend> backend) : state_(std::make_shared<State>()) {
  state_->backend = std::move(backend);
  state_->accounts = std::make_shared<Accounts>();
  auto* taker = dynamic_cast<OwnMemory*>(state_->backend.get());
  if (taker == nullptr) return;
  taker->set_reserve([state = std::weak_ptr(state_)](std::size_t bytes) {
    const std::shared_ptr<State> alive = state.lock();
    if (!alive) throw std::bad_alloc();
    const std::lock_guard lock(alive->accounts->mutex);
    return alive->from_system(bytes, MemoryTag::Workspace);
  });
}

Allocator Allocator::pool() const {
  Allocator a(*this);
  a.state_ = std::make_shared<State>();
  a.state_->backend = state_->backend;
  a.state_->accounts = state_->accounts;
  a.state_->parent = state_->parent ? state_->parent : state_;
  return a;
}

Storage Allocator::allocate(std::size_t bytes, MemoryTag tag) {
  const std::size_t size = size_class(bytes);
  const auto t = static_cast<std::size_t>(tag);
  void* block = nullptr;
  {
    const std::lock_guard lock(state_->accounts->mutex);
    MemoryUse& use = state_->accounts->use;
    auto& blocks = state_->free_blocks[size];
    if (!blocks.empty()) {
      block = blocks.back();
      blocks.pop_back();
      use.cached -= size;
    } else {
      block = state_->from_system(size, tag);
    }
    use.now[t] += size;
    use.total_now += size;
    use.peak[t] = std::max(use.peak[t], use.now[t]);
    use.total_peak = std::max(use.total_peak, use.total_now);
  }
  return {block, [state = state_, size, t](void* p) {
            const std::lock_guard lock(state->accounts->mutex);
            MemoryUse& use = state->accounts->use;
            use.now[t] -= size;
            use.total_now -= size;
            use.cached += size;
            state->free_blocks[size].push_back(p);
          }};
}

MemoryUse Allocator::use() const {
  const std::lock_guard lock(state_->accounts->mutex);
  return state_->accounts->use;
}

void Allocator::reset_peak() {
  const std::lock_guard lock(state_->accounts->mutex);
  MemoryUse& use = state_->accounts->use;
  use.peak = use.now;
  use.total_peak = use.total_now;
}

void Allocator::release_cache() {
  const std::lock_guard lock(state_->accounts->mutex);
  state_->release_cache();
}

}  // namespace fathom
