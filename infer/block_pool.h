// Which blocks of a cache are free. Host bookkeeping: no memory of the device is touched.
#pragma once

#include <cstdint>
#include <vector>

namespace fathom {

/// Blocks in groups of `width` neighbours: group g holds the blocks g * width .. (g + 1) * width - 1. The
/// dense layers of a model always hold the same number of entries, so one table serves them all, and they use
/// a group together, a block for each. A routed layer uses single blocks, of groups that its own sequence
/// took for its routed layers: what another sequence does never decides how well this one is packed.
class BlockPool {
 public:
  BlockPool(std::int64_t groups, std::int64_t width);

  /// InternalError when there is none: look at free_groups() first.
  std::int32_t take();
  void give(std::int32_t group) { free_.push_back(group); }

  std::int64_t width() const { return width_; }
  std::int64_t groups() const { return groups_; }
  std::int64_t free_groups() const { return static_cast<std::int64_t>(free_.size()); }
  std::int64_t blocks() const { return groups_ * width_; }
  std::int64_t free_blocks() const { return free_groups() * width_; }

 private:
  std::int64_t groups_, width_;
  std::vector<std::int32_t> free_;
};

}  // namespace fathom
