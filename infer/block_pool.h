// Which blocks of a cache are free. Host bookkeeping: no memory of the device is touched.
#pragma once

#include <cstdint>
#include <set>
#include <vector>

namespace fathom {

/// Blocks in groups of `width` neighbours. The dense layers of a model always hold the same number of
/// entries, so one table serves them all: they take a whole group, a block for each. Routed layers take
/// single blocks, from groups that are broken up for them; a group is whole again when the last of its blocks
/// comes back. Ids: group g holds the blocks g * width .. (g + 1) * width - 1.
class BlockPool {
 public:
  BlockPool(std::int64_t groups, std::int64_t width);

  /// InternalError when there is none: ask fits() first.
  std::int32_t take_group();
  void give_group(std::int32_t group);
  std::int32_t take_block();
  void give_block(std::int32_t block);

  /// Whether so many groups and single blocks can be taken.
  bool fits(std::int64_t groups, std::int64_t blocks) const;

  std::int64_t width() const { return width_; }
  std::int64_t groups() const { return static_cast<std::int64_t>(loose_.size()); }
  std::int64_t blocks() const { return groups() * width_; }
  std::int64_t free_blocks() const;

 private:
  std::int64_t width_;
  std::vector<std::int32_t> whole_;               // free groups
  std::vector<std::vector<std::int32_t>> loose_;  // by group: its free blocks, while it is broken up
  std::set<std::int32_t> broken_;                 // groups with free blocks, of those broken up
  std::int64_t loose_blocks_ = 0;
};

}  // namespace fathom
