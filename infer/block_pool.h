// Which blocks of a cache are free. Host bookkeeping: no memory of the device is touched.
#pragma once

#include <cstdint>
#include <vector>

namespace fathom {

/// Blocks in groups of `width` neighbours: group g holds the blocks g * width .. (g + 1) * width - 1. The
/// dense layers of a model always hold the same number of entries, so one table serves them all, and they use
/// a group together, a block for each. A routed layer uses single blocks, of groups that its own sequence
/// took for its routed layers: what another sequence does never decides how well this one is packed.
///
/// Groups are counted: sequences that read the same entries use the group together, and what is to be found
/// again by later ones (prefix_cache.h) is kept beside that. Nothing is written into a group again before
/// nobody uses or keeps it.
class BlockPool {
 public:
  BlockPool(std::int64_t groups, std::int64_t width);

  /// InternalError when there is none: look at free_groups() first.
  std::int32_t take();
  /// One more uses it, or one less. A group that is shared is used or kept already.
  void share(std::int32_t group);
  void give(std::int32_t group);
  /// Once more, or once less, it is kept for later. A group that begins to be kept is used.
  void keep(std::int32_t group);
  void drop(std::int32_t group);

  std::int64_t width() const { return width_; }
  std::int64_t groups() const { return groups_; }
  std::int64_t free_groups() const { return static_cast<std::int64_t>(free_.size()); }
  /// Kept, and used by nobody: free as soon as they are dropped.
  std::int64_t idle_groups() const { return idle_; }
  bool is_idle(std::int32_t group) const {
    const Holders& h = holders_[static_cast<std::size_t>(group)];
    return h.users == 0 && h.keepers > 0;
  }
  std::int64_t available_groups() const { return free_groups() + idle_; }
  std::int64_t blocks() const { return groups_ * width_; }
  std::int64_t idle_blocks() const { return idle_ * width_; }
  std::int64_t available_blocks() const { return available_groups() * width_; }

 private:
  struct Holders {
    std::int32_t users = 0, keepers = 0;
  };
  /// Tells of a change of `h` that has been made.
  void settle(std::int32_t group, const Holders& before);

  std::int64_t groups_, width_;
  std::vector<std::int32_t> free_;
  std::vector<Holders> holders_;  // by group
  std::int64_t idle_ = 0;
};

}  // namespace fathom
