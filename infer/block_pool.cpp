#include "infer/block_pool.h"

#include <numeric>

#include "kernels/error.h"

namespace fathom {

BlockPool::BlockPool(std::int64_t groups, std::int64_t width)
    : groups_(groups),
      width_(width),
      free_(static_cast<std::size_t>(groups)),
      holders_(static_cast<std::size_t>(groups)) {
  std::iota(free_.rbegin(), free_.rend(), 0);  // the first groups are taken first
}

std::int32_t BlockPool::take() {
  if (free_.empty()) throw InternalError("[cache] no group of blocks is free");
  const std::int32_t group = free_.back();
  free_.pop_back();
  holders_[static_cast<std::size_t>(group)] = {1, 0};
  return group;
}

void BlockPool::settle(std::int32_t group, const Holders& before) {
  const Holders& h = holders_[static_cast<std::size_t>(group)];
  if (h.users < 0 || h.keepers < 0 || before.users + before.keepers == 0)
    throw InternalError("[cache] a group of blocks that nobody holds");
  const auto is_idle_of = [](const Holders& x) { return x.users == 0 && x.keepers > 0; };
  idle_ += (is_idle_of(h) ? 1 : 0) - (is_idle_of(before) ? 1 : 0);
  if (h.users + h.keepers == 0) free_.push_back(group);
}

void BlockPool::share(std::int32_t group) {
  const Holders before = holders_[static_cast<std::size_t>(group)];
  ++holders_[static_cast<std::size_t>(group)].users;
  settle(group, before);
}

void BlockPool::give(std::int32_t group) {
  const Holders before = holders_[static_cast<std::size_t>(group)];
  --holders_[static_cast<std::size_t>(group)].users;
  settle(group, before);
}

void BlockPool::keep(std::int32_t group) {
  const Holders before = holders_[static_cast<std::size_t>(group)];
  ++holders_[static_cast<std::size_t>(group)].keepers;
  settle(group, before);
}

void BlockPool::drop(std::int32_t group) {
  const Holders before = holders_[static_cast<std::size_t>(group)];
  --holders_[static_cast<std::size_t>(group)].keepers;
  settle(group, before);
}

}  // namespace fathom
