#include "infer/kv_cache.h"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "kernels/error.h"
#include "src/core/units.h"

namespace fathom {

namespace {

CacheShape shape_of(const Transformer& model, std::int64_t block) {
  const ModelConfig& m = model.config();
  CacheShape s;
  s.heads = m.heads;
  s.kv_heads = m.kv_heads;
  s.head_dim = m.head_dim();
  s.scale = 1.0 / std::sqrt(static_cast<double>(s.head_dim));
  s.block = block;
  s.bits = model.kv_bits();
  return s;
}

// Whether a sequence's first rows, which see nothing but each other, attend as rows without a cache do. On a
// GPU that may be cuDNN's, which is ahead by far and builds a plan for each length, in up to a second: for
// lengths that come again, as whole chunks of long prompts do.
bool attends_without_cache(const Context& c, const CacheShape& s) {
  constexpr std::int64_t kComesAgain = 1024;
  return !c.backend().is_cpu() && c.compute_dtype() == DType::BF16 && s.bits == 16 &&
         s.rows % kComesAgain == 0;
}

// Dense layers take blocks together; a model that routes every layer takes them one by one.
std::int64_t group_width(const Transformer& model) {
  const std::int64_t dense = model.config().depth - static_cast<std::int64_t>(model.routed_layers().size());
  return std::max<std::int64_t>(1, dense);
}

}  // namespace

std::int64_t KvCache::groups_in(Context& c, const KvCacheOptions& options, const Transformer& model) {
  if (options.block < 16 || options.block % 16 != 0) {
    throw UserError(fmt::format("A cache's block of {} tokens is no multiple of 16.", options.block),
                    "64 is a good size.");
  }
  const std::int64_t group_bytes = block_bytes(c, options, model) * group_width(model);
  const std::int64_t groups = options.bytes / group_bytes;
  const auto routed = static_cast<std::int64_t>(model.routed_layers().size());
  const std::int64_t least = 1 + (routed + group_width(model) - 1) / group_width(model);
  if (groups < least) {
    throw UserError(fmt::format("A cache of {} holds no token of this model on {}: its smallest size is {}.",
                                format_bytes(static_cast<double>(options.bytes)), c.backend().description(),
                                format_bytes(static_cast<double>(least * group_bytes))),
                    "Give the cache more memory, or a smaller block.");
  }
  return groups;
}

std::int64_t KvCache::block_bytes(Context& c, const KvCacheOptions& options, const Transformer& model) {
  return options.block * entry_bytes(c, model);
}

DType KvCache::dtype(const Context& c, const Transformer& model) {
  return model.kv_bits() < 16 ? DType::U8 : c.compute_dtype();
}

std::int64_t KvCache::entry_bytes(const Context& c, const Transformer& model) {
  return shape_of(model, 1).block_elements() * static_cast<std::int64_t>(size_of(dtype(c, model)));
}

KvCache::KvCache(Context& c, const Transformer& model, const KvCacheOptions& options)
    : block_(options.block),
      bytes_per_block_(block_bytes(c, options, model)),
      shape_(shape_of(model, options.block)),
      pool_(groups_in(c, options, model), group_width(model)) {
  for (std::int64_t layer = 0; layer < model.config().depth; ++layer) {
    is_routed_.push_back(model.routing().routes(layer));
    key_means_.push_back(model.key_means(layer));
    place_.push_back(is_routed_.back() ? routed_++ : dense_++);
  }
  shape_.blocks = pool_.blocks();
  try {
    memory_ = c.empty({shape_.blocks * shape_.block_elements()}, dtype(c, model));
  } catch (const MemoryError& e) {
    throw MemoryError(fmt::format("There is no memory for a cache of {} on {}.",
                                  format_bytes(static_cast<double>(shape_.blocks * bytes_per_block_)),
                                  c.backend().description()),
                      "Give the cache less.");
  }
}

KvCache::Sequence& KvCache::at(SequenceId id) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) throw InternalError(fmt::format("[cache] no sequence {}", id));
  return found->second;
}
const KvCache::Sequence& KvCache::at(SequenceId id) const { return const_cast<KvCache*>(this)->at(id); }

SequenceId KvCache::add() {
  sequences_[next_].routed.resize(static_cast<std::size_t>(routed_));
  return next_++;
}

void KvCache::remove(SequenceId id) {
  const Sequence& s = at(id);
  for (const std::int32_t group : s.groups) pool_.give(group);
  for (const std::int32_t group : s.routed_groups) pool_.give(group);
  for (const std::int32_t group : s.borrowed) pool_.give(group);
  sequences_.erase(id);
  queries_.erase(id);
}

std::int64_t KvCache::entries(SequenceId id, std::int64_t layer) const {
  const auto l = static_cast<std::size_t>(layer);
  return is_routed_[l] ? at(id).routed[static_cast<std::size_t>(place_[l])].entries : at(id).tokens;
}

std::vector<std::vector<std::uint8_t>> KvCache::kept(SequenceId id, std::int64_t begin,
                                                     std::int64_t end) const {
  const Sequence& s = at(id);
  std::vector<std::vector<std::uint8_t>> tokens(static_cast<std::size_t>(end - begin),
                                                std::vector<std::uint8_t>(s.routed.size()));
  for (std::size_t i = 0; i < s.routed.size(); ++i) {
    const std::vector<std::int32_t>& of = s.routed[i].tokens;
    for (auto t = std::lower_bound(of.begin(), of.end(), begin); t != of.end() && *t < end; ++t)
      tokens[static_cast<std::size_t>(*t - begin)][i] = 1;
  }
  return tokens;
}

std::int64_t KvCache::missing_groups(SequenceId id, std::int64_t tokens, std::int64_t more) const {
  const Sequence& s = at(id);
  const auto held = [](const auto& list) { return static_cast<std::int64_t>(list.size()); };
  std::int64_t groups = dense_ > 0 ? std::max<std::int64_t>(0, blocks_for(tokens) - held(s.groups)) : 0;
  std::int64_t blocks = -held(s.spare);
  // A layer that took entries back may hold blocks that it does not need, and no other layer gets these.
  for (const Layer& layer : s.routed)
    blocks += std::max<std::int64_t>(0, blocks_for(layer.entries + more) - held(layer.blocks)) +
              (layer.has_borrowed_tail ? 1 : 0);
  if (blocks > 0) groups += (blocks + pool_.width() - 1) / pool_.width();
  return groups;
}

bool KvCache::fits(std::span<const NewRows> rows) const {
  std::int64_t groups = 0;
  for (const NewRows& n : rows) groups += missing_groups(n.sequence, at(n.sequence).tokens + n.rows, n.rows);
  return groups <= pool_.free_groups();
}

bool KvCache::could_hold(std::int64_t tokens) const {
  return dense_ == 0 || blocks_for(tokens) <= pool_.groups();
}

KvCache::Tables KvCache::upload(Context& c, const std::vector<const std::vector<std::int32_t>*>& blocks,
                                const std::vector<std::int32_t>& sequences,
                                const std::vector<std::int32_t>& lengths) const {
  std::size_t most = 1;
  for (const auto* list : blocks) most = std::max(most, list->size());
  std::vector<std::int32_t> tables(blocks.size() * most, 0);
  for (std::size_t i = 0; i < blocks.size(); ++i)
    std::copy(blocks[i]->begin(), blocks[i]->end(), tables.begin() + static_cast<std::ptrdiff_t>(i * most));
  // One copy for all three.
  std::vector<std::int32_t> all = std::move(tables);
  const auto end_of_tables = static_cast<std::int64_t>(all.size());
  const auto rows = static_cast<std::int64_t>(sequences.size());
  all.insert(all.end(), sequences.begin(), sequences.end());
  all.insert(all.end(), lengths.begin(), lengths.end());
  const Tensor both = c.empty({static_cast<std::int64_t>(all.size())}, DType::I32, MemoryTag::Data);
  from_host(c.backend(), both, all);
  Tables t{both.rows(0, end_of_tables), both.rows(end_of_tables, end_of_tables + rows),
           both.rows(end_of_tables + rows, end_of_tables + 2 * rows), shape_};
  t.shape.rows = rows;
  t.shape.sequences = static_cast<std::int64_t>(blocks.size());
  t.shape.table = static_cast<std::int64_t>(most);
  return t;
}

void KvCache::begin(Context& c, std::span<const NewRows> rows) {
  row_sequence_.clear();
  is_beginning_ = rows.size() == 1 && at(rows.front().sequence).tokens == 0;
  row_token_.clear();
  std::vector<const std::vector<std::int32_t>*> blocks;
  std::vector<std::int32_t> sequences, lengths;
  for (const NewRows& n : rows) {
    Sequence& s = at(n.sequence);
    for (std::int64_t i = 0; i < n.rows; ++i) {
      row_sequence_.push_back(n.sequence);
      row_token_.push_back(s.tokens);
      sequences.push_back(static_cast<std::int32_t>(blocks.size()));
      lengths.push_back(static_cast<std::int32_t>(++s.tokens));
    }
    take_groups(s);
    blocks.push_back(&s.groups);
  }
  if (dense_ == 0) return;
  dense_tables_ = upload(c, blocks, sequences, lengths);
  dense_tables_.shape.stride = pool_.width();
}

void KvCache::take_groups(Sequence& s) {
  while (dense_ > 0 && static_cast<std::int64_t>(s.groups.size()) < blocks_for(s.tokens))
    s.groups.push_back(pool_.take());
}

std::int32_t KvCache::take_block(Sequence& s) {
  if (s.spare.empty()) {
    const std::int32_t group = pool_.take();
    s.routed_groups.push_back(group);
    for (std::int64_t i = pool_.width(); i-- > 0;)
      s.spare.push_back(static_cast<std::int32_t>(group * pool_.width() + i));
  }
  const std::int32_t block = s.spare.back();
  s.spare.pop_back();
  return block;
}

void KvCache::make_room(Sequence& s, Layer& layer, std::int64_t rows) {
  if (layer.has_borrowed_tail) throw InternalError("[cache] an entry for a block that others have");
  while (static_cast<std::int64_t>(layer.blocks.size()) < blocks_for(layer.entries + rows))
    layer.blocks.push_back(take_block(s));
}

void KvCache::assume(SequenceId id, std::int64_t tokens, std::int64_t entries) {
  if (missing_groups(id, tokens, entries) > pool_.free_groups())
    throw InternalError("[cache] more entries than there are blocks for");
  Sequence& s = at(id);
  s.tokens = tokens;
  take_groups(s);
  for (Layer& layer : s.routed) {
    while (layer.entries < entries) add_entry(layer, layer.entries * tokens / entries);
    while (static_cast<std::int64_t>(layer.blocks.size()) < blocks_for(entries))
      layer.blocks.push_back(take_block(s));
  }
}

// Codes: each block is a sequence of its own, to which random rows are appended.
void KvCache::fill_random(Context& c) const {
  if (shape_.bits == 16) {
    c.backend().fill_normal(memory_, 1.0, 1, 0);
    return;
  }
  CacheShape s = shape_;
  s.heads = 0;
  s.table = 1;
  const std::int64_t most = std::max<std::int64_t>(1, 4096 / block_);  // blocks at a time
  const Tensor rows = c.empty({most * block_, 2 * s.kv_heads * s.head_dim});
  c.backend().fill_normal(rows, 1.0, 1, 0);
  for (std::int64_t first = 0; first < s.blocks; first += most) {
    const std::int64_t blocks = std::min(most, s.blocks - first);
    std::vector<std::vector<std::int32_t>> numbers;
    std::vector<std::int32_t> sequences, lengths;
    for (std::int64_t i = 0; i < blocks * block_; ++i) {
      if (i % block_ == 0) numbers.push_back({static_cast<std::int32_t>(first + i / block_)});
      sequences.push_back(static_cast<std::int32_t>(i / block_));
      lengths.push_back(static_cast<std::int32_t>(i % block_ + 1));
    }
    std::vector<const std::vector<std::int32_t>*> tables;
    tables.reserve(numbers.size());
    for (const auto& number : numbers) tables.push_back(&number);
    const Tables t = upload(c, tables, sequences, lengths);
    s.rows = blocks * block_;
    s.sequences = blocks;
    c.backend().cache_append(memory_, rows.rows(0, s.rows), t.tables, t.sequences, t.lengths, s);
  }
}

void KvCache::reserve(SequenceId id, std::int64_t rows) {
  Sequence& s = at(id);
  while (dense_ > 0 && static_cast<std::int64_t>(s.groups.size()) < blocks_for(s.tokens + rows))
    s.groups.push_back(pool_.take());
  for (Layer& layer : s.routed) make_room(s, layer, rows);
}

void KvCache::commit(SequenceId id, std::span<const std::uint8_t> kept) {
  Sequence& s = at(id);
  for (std::size_t i = 0; i < s.routed.size(); ++i) {
    if (kept[i] != 0) add_entry(s.routed[i], s.tokens);
  }
  ++s.tokens;
}

std::span<const std::int32_t> KvCache::blocks(SequenceId id, std::int64_t table) const {
  const Sequence& s = at(id);
  return table == 0 ? std::span(s.groups)
                    : std::span(s.routed.at(static_cast<std::size_t>(table - 1)).blocks);
}

std::vector<std::int32_t> KvCache::routed_entries(SequenceId id) const {
  std::vector<std::int32_t> entries;
  for (const Layer& layer : at(id).routed) entries.push_back(static_cast<std::int32_t>(layer.entries));
  return entries;
}

// Which of the pass's rows a routed layer keeps is known on the device only; their sequences and the blocks
// are known here.
void KvCache::expect(Context& c, std::int64_t layer_number, const Tensor& kept) {
  const auto routed = static_cast<std::size_t>(place_[static_cast<std::size_t>(layer_number)]);
  const std::vector<std::int32_t> rows = to_host<std::int32_t>(c.backend(), kept);
  std::vector<const std::vector<std::int32_t>*> blocks;
  std::vector<std::int32_t> sequences, lengths;
  SequenceId last = -1;
  for (const std::int32_t row : rows) {
    const SequenceId id = row_sequence_.at(static_cast<std::size_t>(row));
    Sequence& s = at(id);
    Layer& layer = s.routed[routed];
    if (id != last) blocks.push_back(&layer.blocks);
    last = id;
    make_room(s, layer);
    add_entry(layer, row_token_[static_cast<std::size_t>(row)]);
    sequences.push_back(static_cast<std::int32_t>(blocks.size()) - 1);
    lengths.push_back(static_cast<std::int32_t>(layer.entries));
  }
  expected_rows_ = rows;
  routed_tables_ = upload(c, blocks, sequences, lengths);
}

Tensor KvCache::attend(Context& c, std::int64_t layer, const Tensor& qkv, const Tensor& kept) {
  const auto l = static_cast<std::size_t>(layer);
  Tables t = is_routed_[l] ? routed_tables_ : dense_tables_;
  if (!is_routed_[l]) t.shape.offset = place_[l];
  t.shape.key_means = key_means_[l];
  if (kept.defined() && kept.size() != t.shape.rows)
    throw InternalError("[cache] rows that were not expected");
  if (!queries_.empty()) keep_queries(c, layer, qkv);
  Tensor out = c.empty({t.shape.rows, t.shape.heads * t.shape.head_dim});
  c.backend().cache_append(memory_, qkv, t.tables, t.sequences, t.lengths, t.shape);
  if (is_beginning_ && !is_routed_[l] && attends_without_cache(c, t.shape)) {
    const CacheShape& s = t.shape;
    c.backend().attention_forward(out, c.empty_stat({s.heads * s.rows}), qkv, {},
                                  {1, s.rows, s.heads, s.kv_heads, s.head_dim, s.scale});
  } else {
    c.backend().cached_attention(out, memory_, qkv, t.tables, t.sequences, t.lengths, t.shape);
  }
  c.check("cached_attention", "", out);
  return out;
}

}  // namespace fathom
