#include "infer/block_pool.h"

#include <numeric>

#include "kernels/error.h"

namespace fathom {

BlockPool::BlockPool(std::int64_t groups, std::int64_t width)
    : groups_(groups), width_(width), free_(static_cast<std::size_t>(groups)) {
  std::iota(free_.rbegin(), free_.rend(), 0);  // the first groups are taken first
}

std::int32_t BlockPool::take() {
  if (free_.empty()) throw InternalError("[cache] no group of blocks is free");
  const std::int32_t group = free_.back();
  free_.pop_back();
  return group;
}

}  // namespace fathom
