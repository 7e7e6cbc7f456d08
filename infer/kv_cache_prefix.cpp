// What sequences that begin with the same tokens share.
//
// A sequence only ever adds entries behind those that it has, so the entries of its first tokens stay what
// they are in their blocks whatever it does afterwards, and whoever knows their number can read them. A
// sequence that goes on from there writes into blocks of its own: of each routed layer's last block, if that
// is not full, it takes a copy first.
#include <algorithm>

#include "infer/kv_cache.h"
#include "kernels/error.h"

namespace fathom {

CacheSegment KvCache::keep(SequenceId id, std::int64_t index) {
  const Sequence& s = at(id);
  const std::int64_t begin = index * block_, end = begin + block_;
  if (end > s.tokens) throw InternalError("[cache] tokens that are not there yet");
  CacheSegment segment;
  if (dense_ > 0) {
    segment.group = s.groups[static_cast<std::size_t>(index)];
    pool_.keep(segment.group);
  }
  for (const Layer& layer : s.routed) {
    const auto entries_before = [&](std::int64_t token) {
      return std::lower_bound(layer.tokens.begin(), layer.tokens.end(), token) - layer.tokens.begin();
    };
    CacheSegment::Layer& of = segment.routed.emplace_back();
    of.before = entries_before(begin);
    of.first = of.before / block_ * block_;
    const std::int64_t last = entries_before(end);
    of.tokens.assign(layer.tokens.begin() + of.first, layer.tokens.begin() + last);
    of.blocks.assign(layer.blocks.begin() + of.first / block_, layer.blocks.begin() + blocks_for(last));
    for (const std::int32_t block : of.blocks) pool_.keep(group_of(block));
  }
  return segment;
}

void KvCache::drop(const CacheSegment& segment) {
  if (segment.group >= 0) pool_.drop(segment.group);
  for (const CacheSegment::Layer& layer : segment.routed) {
    for (const std::int32_t block : layer.blocks) pool_.drop(group_of(block));
  }
}

bool KvCache::is_idle(const CacheSegment& segment) const {
  if (segment.group >= 0) return pool_.is_idle(segment.group);
  return std::any_of(segment.routed.begin(), segment.routed.end(), [&](const CacheSegment::Layer& layer) {
    return std::any_of(layer.blocks.begin(), layer.blocks.end(),
                       [&](std::int32_t block) { return pool_.is_idle(group_of(block)); });
  });
}

void KvCache::adopt(SequenceId id, std::span<const CacheSegment* const> segments) {
  Sequence& s = at(id);
  if (s.tokens > 0) throw InternalError("[cache] a sequence adopts before it has tokens");
  for (const CacheSegment* segment : segments) {
    s.tokens += block_;
    if (dense_ > 0) {
      s.groups.push_back(segment->group);
      pool_.share(segment->group);
    }
    for (std::size_t i = 0; i < s.routed.size(); ++i) {
      const CacheSegment::Layer& from = segment->routed[i];
      Layer& layer = s.routed[i];
      // A block that was not full goes on in this segment's version of it.
      layer.tokens.resize(static_cast<std::size_t>(from.first));
      layer.blocks.resize(static_cast<std::size_t>(from.first / block_));
      layer.tokens.insert(layer.tokens.end(), from.tokens.begin(), from.tokens.end());
      layer.blocks.insert(layer.blocks.end(), from.blocks.begin(), from.blocks.end());
    }
  }
  for (Layer& layer : s.routed) {
    layer.entries = static_cast<std::int64_t>(layer.tokens.size());
    layer.has_borrowed_tail = layer.entries % block_ != 0;
    for (const std::int32_t block : layer.blocks) {
      s.borrowed.push_back(group_of(block));
      pool_.share(group_of(block));
    }
  }
}

void KvCache::own_tails(Context& c, SequenceId id) {
  Sequence& s = at(id);
  Copies copies;
  copies.from.resize(static_cast<std::size_t>(shape_.kv_heads));
  std::vector<std::int32_t> left;  // groups that are no longer read
  for (Layer& layer : s.routed) {
    if (!layer.has_borrowed_tail) continue;
    const std::int32_t from = layer.blocks.back(), to = take_block(s);
    for (std::int64_t i = 0; i < layer.entries % block_; ++i) {
      for (auto& of_head : copies.from) of_head.push_back(static_cast<std::int32_t>(from * block_ + i));
      copies.to.push_back(static_cast<std::int32_t>(to * block_ + i));
    }
    layer.blocks.back() = to;
    layer.has_borrowed_tail = false;
    left.push_back(group_of(from));
  }
  copy(c, copies);
  for (const std::int32_t group : left) {
    s.borrowed.erase(std::find(s.borrowed.begin(), s.borrowed.end(), group));
    pool_.give(group);
  }
}

}  // namespace fathom
