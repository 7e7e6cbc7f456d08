// Beginnings of texts whose keys and values are still in the cache.
//
// A tree by blocks of tokens: a node is a block of tokens behind those of its parents, and what it left in
// the layers (CacheSegment). Routing looks at a token and what came before it alone, so two texts that begin
// with the same tokens, and are routed by the same threshold, have the same entries there in all layers, and
// as many of them. The model and the format of keys and values are the cache's own.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "infer/kv_cache.h"

namespace fathom {

class PrefixCache {
 public:
  /// `cache` outlives it.
  explicit PrefixCache(KvCache& cache) : cache_(cache) {}

  /// Of the longest beginning of `ids` that is known, in whole blocks: what to adopt (KvCache::adopt) before
  /// anything else is asked of this.
  std::vector<const CacheSegment*> find(double threshold, std::span<const std::int32_t> ids);
  /// `ids`, whole blocks of them, are the first tokens of a sequence, computed with this threshold.
  void remember(double threshold, std::span<const std::int32_t> ids, SequenceId sequence);
  /// Forgets the end of a beginning, one block of tokens: that which nobody has asked for for longest of
  /// those whose blocks nobody uses, if there is one. False: there was nothing to forget.
  bool forget_one();

 private:
  using Tokens = std::vector<std::int32_t>;
  struct Node {
    Node* parent = nullptr;
    CacheSegment segment;
    std::map<Tokens, std::unique_ptr<Node>> children;
    std::map<Tokens, std::unique_ptr<Node>>::iterator own;  // among the parent's children
    std::list<Node*>::iterator place;                       // in order_
  };

  Node* child(const Node& node, std::span<const std::int32_t> ids, std::size_t index) const;
  Node* add(Node& parent, std::span<const std::int32_t> ids, std::size_t index, SequenceId sequence);
  void touch(Node* node);
  void forget(Node* node);

  KvCache& cache_;
  std::map<double, Node> roots_;  // by threshold
  /// All nodes, the one that was asked for last first, and each before its children: so the last one has
  /// none.
  std::list<Node*> order_;
};

}  // namespace fathom
