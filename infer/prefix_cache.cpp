#include "infer/prefix_cache.h"

#include <algorithm>

namespace fathom {

namespace {

// Whether a segment goes on where the one before it ended. Two texts with the same tokens may differ here
// where rows are not invariant: then a rounding has sent a token another way.
bool follows(const CacheSegment& before, const CacheSegment& segment) {
  for (std::size_t i = 0; i < segment.routed.size(); ++i) {
    const CacheSegment::Layer &a = before.routed[i], &b = segment.routed[i];
    if (a.end() != b.before) return false;
    // What both have of a block that was not full.
    if (!std::equal(a.tokens.begin() + (b.first - a.first), a.tokens.end(), b.tokens.begin())) return false;
  }
  return true;
}

}  // namespace

PrefixCache::Node* PrefixCache::child(const Node& node, std::span<const std::int32_t> ids,
                                      std::size_t index) const {
  const auto block = static_cast<std::size_t>(cache_.block());
  const auto tokens = ids.subspan(index * block, block);
  const auto found = node.children.find(Tokens(tokens.begin(), tokens.end()));
  return found == node.children.end() ? nullptr : found->second.get();
}

// The node and all before it, which stay in front of it.
void PrefixCache::touch(Node* node) {
  for (; node != nullptr && node->parent != nullptr; node = node->parent)
    order_.splice(order_.begin(), order_, node->place);
}

std::vector<const CacheSegment*> PrefixCache::find(double threshold, std::span<const std::int32_t> ids) {
  std::vector<const CacheSegment*> segments;
  const auto root = roots_.find(threshold);
  if (root == roots_.end()) return segments;
  Node* node = &root->second;
  for (std::size_t i = 0; i < ids.size() / static_cast<std::size_t>(cache_.block()); ++i) {
    Node* const next = child(*node, ids, i);
    if (next == nullptr) break;
    node = next;
    segments.push_back(&node->segment);
  }
  touch(node);
  return segments;
}

PrefixCache::Node* PrefixCache::add(Node& parent, std::span<const std::int32_t> ids, std::size_t index,
                                    SequenceId sequence) {
  auto node = std::make_unique<Node>();
  node->parent = &parent;
  node->segment = cache_.keep(sequence, static_cast<std::int64_t>(index));
  if (parent.parent != nullptr && !follows(parent.segment, node->segment)) {
    cache_.drop(node->segment);
    return nullptr;
  }
  const auto block = static_cast<std::size_t>(cache_.block());
  const auto tokens = ids.subspan(index * block, block);
  Node* const added = node.get();
  added->own = parent.children.emplace(Tokens(tokens.begin(), tokens.end()), std::move(node)).first;
  added->place = order_.insert(order_.begin(), added);
  return added;
}

void PrefixCache::remember(double threshold, std::span<const std::int32_t> ids, SequenceId sequence) {
  Node* node = &roots_[threshold];
  for (std::size_t i = 0; i < ids.size() / static_cast<std::size_t>(cache_.block()); ++i) {
    Node* next = child(*node, ids, i);
    if (next == nullptr) next = add(*node, ids, i, sequence);
    if (next == nullptr) break;
    node = next;
  }
  touch(node);
  // A model that routes every layer may keep nothing of a block, and its tokens would cost no block.
  while (static_cast<std::int64_t>(order_.size()) > cache_.pool().groups()) forget_one();
}

bool PrefixCache::forget_one() {
  if (order_.empty()) return false;
  const auto last = std::find_if(order_.rbegin(), order_.rend(), [&](const Node* node) {
    return node->children.empty() && cache_.is_idle(node->segment);
  });
  forget(last == order_.rend() ? order_.back() : *last);
  return true;
}

void PrefixCache::forget(Node* node) {
  cache_.drop(node->segment);
  order_.erase(node->place);
  Node* const parent = node->parent;
  parent->children.erase(node->own);
  if (parent->parent != nullptr || !parent->children.empty()) return;
  std::erase_if(roots_, [](const auto& root) { return root.second.children.empty(); });
}

}  // namespace fathom
