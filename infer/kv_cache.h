// Keys and values of running sequences, in blocks: every dense layer holds an entry for each token of a
// sequence, a routed layer for each token that it kept, packed and in order, without holes.
//
// They are numbers of the compute dtype, or codes of the model's kv_bits() (kernels/cache_codes.h). Whatever
// a row sees it sees as the cache holds it, what came in the same pass and itself included: so a prompt gives
// the same however it is cut, and what Transformer::forward gives without a cache.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "infer/block_pool.h"
#include "src/model/transformer.h"

namespace fathom {

struct KvCacheOptions {
  std::int64_t block = 64;  // entries of a block, a multiple of 16
  std::int64_t bytes = 0;   // of all blocks together: as many blocks as that holds
};

using SequenceId = std::int64_t;

/// Rows of a pass that are the next tokens of a sequence.
struct NewRows {
  SequenceId sequence = 0;
  std::int64_t rows = 0;
};

/// What a block of a sequence's tokens left in the layers, as far as later sequences need it to go on behind
/// these tokens (prefix_cache.h).
struct CacheSegment {
  struct Layer {                       // of a routed layer
    std::int64_t first = 0;            // its blocks begin with this entry, a multiple of the block
    std::int64_t before = 0;           // entries of earlier tokens, from `first` on in these blocks too
    std::vector<std::int32_t> tokens;  // of each entry from `first` on which token it is
    std::vector<std::int32_t> blocks;

    std::int64_t end() const { return first + static_cast<std::int64_t>(tokens.size()); }
  };
  std::int32_t group = -1;  // of the dense layers; -1: there are none
  std::vector<Layer> routed;
};

class KvCache final : public AttentionCache {
 public:
  /// The memory is taken at once. UserError: a block that is no multiple of 16, or less memory than one token
  /// of the model needs. MemoryError: the device has not as much.
  KvCache(Context& c, const Transformer& model, const KvCacheOptions& options);

  /// Bytes of one entry of a layer, its keys and its values.
  static std::int64_t entry_bytes(const Context& c, const Transformer& model);

  SequenceId add();
  /// Its blocks are free again.
  void remove(SequenceId id);

  /// Tokens that a sequence has in the dense layers, and entries that it has in a layer.
  std::int64_t tokens(SequenceId id) const { return at(id).tokens; }
  std::int64_t entries(SequenceId id, std::int64_t layer) const;
  /// Of its tokens from `begin` to before `end`, by routed layer, in their order: 1 where it kept the token.
  std::vector<std::vector<std::uint8_t>> kept(SequenceId id, std::int64_t begin, std::int64_t end) const;

  /// Whether the blocks suffice for these rows, whatever the routed layers keep of them.
  bool fits(std::span<const NewRows> rows) const;
  /// Groups that a sequence needs beside those that it has, for so many tokens in the dense layers and `more`
  /// entries in each routed one.
  std::int64_t missing_groups(SequenceId id, std::int64_t tokens, std::int64_t more) const;
  /// Whether a sequence of so many tokens ever fits, alone and if no routed layer kept any.
  bool could_hold(std::int64_t tokens) const;

  /// What the next pass is over: its rows, sequence after sequence. Fits must have said yes.
  void begin(Context& c, std::span<const NewRows> rows);
  void expect(Context& c, std::int64_t layer, const Tensor& kept) override;
  Tensor attend(Context& c, std::int64_t layer, const Tensor& qkv, const Tensor& kept) override;

  /// For measurements: as if a new sequence had so many tokens, and so many entries in each routed layer;
  /// what is in its blocks stays what it is. InternalError: there are not as many blocks.
  void assume(SequenceId id, std::int64_t tokens, std::int64_t entries);
  /// And random numbers for all keys and values.
  void fill_random(Context& c) const;

  // For sequences that begin as others did (prefix_cache.h):

  /// Keeps what the tokens of block number `index` of a sequence left, all of which it has.
  CacheSegment keep(SequenceId id, std::int64_t index);
  void drop(const CacheSegment& segment);
  /// Whether dropping it makes room, as far as the dense layers' blocks say (or the routed ones', where all
  /// layers are routed).
  bool is_idle(const CacheSegment& segment) const;
  /// A new sequence reads the entries of these segments of consecutive blocks of tokens, the first ones that
  /// there are, as its own. No entry is copied but, by own_tails, those of blocks that are not full.
  void adopt(SequenceId id, std::span<const CacheSegment* const> segments);
  /// Before the sequence's next rows: missing_groups counts what it takes.
  void own_tails(Context& c, SequenceId id);

  // For speculative decoding (speculate/):

  /// Takes back all but the first `tokens` tokens, and what routed layers kept of the others. The blocks stay
  /// the sequence's: its next rows need them.
  void truncate(SequenceId id, std::int64_t tokens);
  /// Entries that a layer has of a sequence's first `tokens` tokens.
  std::int64_t entries_of(SequenceId id, std::int64_t layer, std::int64_t tokens) const;
  enum class Layers : std::uint8_t { All, Dense };
  /// Adds to a sequence what another has of its tokens from `begin` to before `end`, in all layers or in the
  /// dense ones alone, as if they had been computed there. There must be room (has_room).
  void append_tokens(Context& c, SequenceId to, SequenceId from, std::int64_t begin, std::int64_t end,
                     Layers layers = Layers::All);
  /// Of a layer the entries to take, [kv_heads, n]: each key/value head may take others. n is the same for
  /// all dense layers.
  using Chosen = std::vector<std::int32_t>;
  /// Adds chosen entries, by layer. They count as `tokens` tokens: n of the dense layers, where there are
  /// any.
  void append_chosen(Context& c, SequenceId to, SequenceId from, std::int64_t tokens,
                     const std::vector<Chosen>& chosen);
  /// Whether so many tokens, and at most `entries` entries in each routed layer, fit behind what a sequence
  /// has, and leave `spare` groups.
  bool has_room(SequenceId id, std::int64_t tokens, std::int64_t entries, std::int64_t spare = 0) const;
  /// What has_room() asks for blocks that nobody uses, one after the other, before it says no. It returns
  /// false when there are none.
  void reclaim_by(std::function<bool()> reclaim) { reclaim_ = std::move(reclaim); }
  /// Keeps the queries of this sequence's newest row from now on, layer by layer.
  void watch(SequenceId id);
  bool watches(SequenceId id) const { return queries_.contains(id); }
  /// Of a sequence that is watched: here they are, [layers, (H+2G)d]. Nothing is copied: before another
  /// sequence's are written there, leave_queries().
  void set_queries(SequenceId id, const Tensor& queries);
  /// Whichever sequence but this one has its queries in that memory gets them in memory of its own.
  void leave_queries(Context& c, SequenceId to, const Tensor& queries);
  /// For a pass that appends to the dense layers by itself: takes the blocks of so many more tokens, and
  /// counts them. They must fit.
  void extend(SequenceId id, std::int64_t tokens);
  /// Where a dense layer's entries are.
  CacheShape dense_shape(std::int64_t layer) const;
  /// How well chunks of `chunk` entries suit that query, [kv_heads, chunks]: the mean of their keys times the
  /// sum of the group's queries. Empty: the sequence is not watched, or the layer has seen no row of it
  /// since.
  std::vector<float> chunk_scores(Context& c, SequenceId id, std::int64_t layer, std::int64_t chunks,
                                  std::int64_t chunk) const;

  // For a decoder (kernels/decoder.h), which does a step by itself:

  bool has(SequenceId id) const { return sequences_.contains(id); }
  /// Takes the blocks that `rows` more entries in each layer need. Fits must have said yes.
  void reserve(SequenceId id, std::int64_t rows);
  /// The entry is there: in the dense layers, and in the routed ones that kept it.
  void commit(SequenceId id, std::span<const std::uint8_t> kept);
  /// Blocks of a sequence: table 0 is the dense layers', in groups; 1 + i that of routed layer number i.
  std::span<const std::int32_t> blocks(SequenceId id, std::int64_t table) const;
  /// Entries that a sequence has in the routed layers, in their order.
  std::vector<std::int32_t> routed_entries(SequenceId id) const;
  const CacheShape& shape() const { return shape_; }
  const Tensor& memory() const { return memory_; }

  const BlockPool& pool() const { return pool_; }
  std::int64_t block() const { return block_; }
  std::int64_t bytes_per_block() const { return bytes_per_block_; }
  /// Of blocks that running sequences use.
  std::int64_t used_bytes() const { return (pool_.blocks() - pool_.available_blocks()) * bytes_per_block_; }

 private:
  struct Layer {  // of a routed layer of a sequence
    std::vector<std::int32_t> blocks;
    std::int64_t entries = 0;
    std::vector<std::int32_t> tokens;  // of each entry which of the sequence's tokens it is, ascending
    bool has_borrowed_tail = false;    // the last block is not full, and others read or write it
  };
  /// Entries that are to be copied, as their numbers in the pool.
  struct Copies {
    std::vector<std::vector<std::int32_t>> from;  // by key/value head
    std::vector<std::int32_t> to;
  };
  struct Sequence {
    std::vector<std::int32_t> groups;  // of the dense layers
    std::int64_t tokens = 0;
    std::vector<Layer> routed;
    std::vector<std::int32_t> routed_groups;  // whose blocks are the routed layers', or
    std::vector<std::int32_t> spare;          // not yet any layer's
    std::vector<std::int32_t> borrowed;       // groups of others, once for each block of theirs
  };
  /// What rows see: the kernels' tables.
  struct Tables {
    Tensor tables, sequences, lengths;
    CacheShape shape;
  };

  Sequence& at(SequenceId id);
  const Sequence& at(SequenceId id) const;
  std::int64_t blocks_for(std::int64_t entries) const { return (entries + block_ - 1) / block_; }
  Tables upload(Context& c, const std::vector<const std::vector<std::int32_t>*>& blocks,
                const std::vector<std::int32_t>& sequences, const std::vector<std::int32_t>& lengths) const;
  std::int32_t take_block(Sequence& s);
  void make_room(Sequence& s, Layer& layer, std::int64_t rows = 1);
  void take_groups(Sequence& s);
  const Layer* routed(const Sequence& s, std::int64_t layer) const;
  std::int32_t number_of(const Sequence& s, std::int64_t layer, std::int64_t entry) const;
  void add_entry(Layer& layer, std::int64_t token) {
    ++layer.entries;
    layer.tokens.push_back(static_cast<std::int32_t>(token));
  }
  std::int32_t group_of(std::int32_t block) const { return static_cast<std::int32_t>(block / pool_.width()); }
  void copy(Context& c, const Copies& copies) const;
  void keep_queries(Context& c, std::int64_t layer, const Tensor& qkv);
  static DType dtype(const Context& c, const Transformer& model);
  static std::int64_t block_bytes(Context& c, const KvCacheOptions& options, const Transformer& model);
  static std::int64_t groups_in(Context& c, const KvCacheOptions& options, const Transformer& model);

  std::vector<std::int64_t> place_;  // by layer: its number among the dense layers, or among the routed ones
  std::vector<bool> is_routed_;
  std::int64_t dense_ = 0, routed_ = 0;
  std::int64_t block_;
  std::int64_t bytes_per_block_;
  CacheShape shape_;               // what does not change from pass to pass
  std::vector<Tensor> key_means_;  // by layer, of codes; undefined: none
  BlockPool pool_;
  std::function<bool()> reclaim_;
  Tensor memory_;
  std::map<SequenceId, Sequence> sequences_;
  SequenceId next_ = 0;
  std::vector<SequenceId> row_sequence_;     // of the pass: by row
  std::vector<std::int64_t> row_token_;      // likewise: which token of its sequence
  std::vector<std::int32_t> expected_rows_;  // of the layer that expect() was told of
  /// Of those that are watched, by layer [1, (H+2G)d]; undefined: none yet.
  std::map<SequenceId, std::vector<Tensor>> queries_;
  bool is_beginning_ = false;  // of the pass: its rows are the first of one sequence
  Tables dense_tables_;
  Tables routed_tables_;  // of the layer that expect() was told of
};

}  // namespace fathom
