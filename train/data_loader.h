// Which sequences a step trains on: a pure function of (seed, step), whatever the micro-batches or ranks.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "src/io/token_store.h"
#include "src/model/transformer.h"

namespace fathom {

/// A permutation of [0, n) by a keyed Feistel network: random access, no table, every number once an epoch.
std::int64_t permuted(std::int64_t index, std::int64_t n, std::uint64_t key);

class DataLoader {
 public:
  /// UserError when the store holds fewer tokens than one sequence and its last target (seq_len + 1).
  DataLoader(std::shared_ptr<const TokenStore> store, std::int64_t seq_len, bool document_mask);

  /// Sequences in one pass over the store.
  std::int64_t sequences() const { return sequences_; }
  std::int64_t seq_len() const { return seq_len_; }
  const TokenStore& store() const { return *store_; }

  /// Sequences number first, first + 1, ... of the endless shuffled stream of `seed` (each pass in its own
  /// order).
  HostBatch shuffled(std::uint64_t seed, std::int64_t first, std::int64_t count) const;
  Batch shuffled(Context& c, std::uint64_t seed, std::int64_t first, std::int64_t count) const {
    return upload(c, shuffled(seed, first, count));
  }
  /// Sequences in the store's order: evaluation.
  Batch in_order(Context& c, std::int64_t first, std::int64_t count) const;

 private:
  HostBatch batch(const std::vector<std::int64_t>& windows) const;

  std::shared_ptr<const TokenStore> store_;
  std::int64_t seq_len_;
  std::int64_t sequences_;
  bool document_mask_;
};

}  // namespace fathom
