#include "infer/block_pool.h"

#include <numeric>

#include "kernels/error.h"

namespace fathom {

BlockPool::BlockPool(std::int64_t groups, std::int64_t width)
    : width_(width), loose_(static_cast<std::size_t>(groups)) {
  whole_.resize(loose_.size());
  std::iota(whole_.rbegin(), whole_.rend(), 0);  // the first groups are taken first
}

std::int32_t BlockPool::take_group() {
  if (whole_.empty()) throw InternalError("[cache] no group of blocks is free");
  const std::int32_t group = whole_.back();
  whole_.pop_back();
  return group;
}

void BlockPool::give_group(std::int32_t group) { whole_.push_back(group); }

std::int32_t BlockPool::take_block() {
  if (broken_.empty()) {
    const std::int32_t group = take_group();
    std::vector<std::int32_t>& blocks = loose_[static_cast<std::size_t>(group)];
    for (std::int64_t i = width_; i-- > 0;) blocks.push_back(static_cast<std::int32_t>(group * width_ + i));
    loose_blocks_ += width_;
    broken_.insert(group);
  }
  const std::int32_t group = *broken_.begin();
  std::vector<std::int32_t>& blocks = loose_[static_cast<std::size_t>(group)];
  const std::int32_t block = blocks.back();
  blocks.pop_back();
  --loose_blocks_;
  if (blocks.empty()) broken_.erase(group);
  return block;
}

void BlockPool::give_block(std::int32_t block) {
  const auto group = static_cast<std::int32_t>(block / width_);
  std::vector<std::int32_t>& blocks = loose_[static_cast<std::size_t>(group)];
  blocks.push_back(block);
  ++loose_blocks_;
  if (static_cast<std::int64_t>(blocks.size()) < width_) {
    broken_.insert(group);
    return;
  }
  loose_blocks_ -= width_;
  blocks.clear();
  broken_.erase(group);
  whole_.push_back(group);
}

bool BlockPool::fits(std::int64_t groups, std::int64_t blocks) const {
  const std::int64_t missing = blocks > loose_blocks_ ? blocks - loose_blocks_ : 0;
  return groups + (missing + width_ - 1) / width_ <= static_cast<std::int64_t>(whole_.size());
}

std::int64_t BlockPool::free_blocks() const {
  return static_cast<std::int64_t>(whole_.size()) * width_ + loose_blocks_;
}

}  // namespace fathom
