// Device memory that ops lend each other: valid for one op, in one stream's order.
#pragma once

#include <cstddef>
#include <vector>

namespace fathom::cuda {

class Scratch {
 public:
  /// At least `bytes`: the newest block, or a larger one of allocate(n), which returns n bytes or throws.
  /// Then nothing has changed. Older blocks stay, since a captured graph may hold their addresses.
  template <typename Allocate>
  void* get(std::size_t bytes, Allocate&& allocate) {
    if (blocks_.empty() || bytes > newest_bytes_) {
      const std::size_t size = size_for(bytes);
      blocks_.reserve(blocks_.size() + 1);  // so that a block that is there is never lost
      blocks_.push_back(allocate(size));
      newest_bytes_ = size;
      held_bytes_ += size;
    }
    return blocks_.back();
  }

  const std::vector<void*>& blocks() const { return blocks_; }
  /// Bytes of all blocks.
  std::size_t held_bytes() const { return held_bytes_; }

  /// What a request of `bytes` takes: some room to grow, so that ragged shapes do not ask each time.
  static std::size_t size_for(std::size_t bytes) {
    constexpr std::size_t kLeast = 64U << 20;
    const std::size_t roomy = bytes + bytes / 4;
    return roomy > kLeast ? roomy : kLeast;
  }

 private:
  std::vector<void*> blocks_;
  std::size_t newest_bytes_ = 0;
  std::size_t held_bytes_ = 0;
};

}  // namespace fathom::cuda
