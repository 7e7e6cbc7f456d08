// What speculative decoding does with a cache: rows that are taken back, sequences that are made of others'
// entries, and scores of chunks.
#include <algorithm>
#include <utility>

#include "infer/kv_cache.h"
#include "infer/pieces.h"
#include "kernels/error.h"

namespace fathom {

const KvCache::Layer* KvCache::routed(const Sequence& s, std::int64_t layer) const {
  const auto l = static_cast<std::size_t>(layer);
  return is_routed_[l] ? &s.routed[static_cast<std::size_t>(place_[l])] : nullptr;
}

std::int64_t KvCache::entries_of(SequenceId id, std::int64_t layer, std::int64_t tokens) const {
  const Layer* r = routed(at(id), layer);
  if (r == nullptr) return std::min(tokens, at(id).tokens);
  return std::lower_bound(r->tokens.begin(), r->tokens.end(), tokens) - r->tokens.begin();
}

void KvCache::truncate(SequenceId id, std::int64_t tokens) {
  Sequence& s = at(id);
  if (tokens > s.tokens) throw InternalError("[cache] fewer tokens than are to be left");
  s.tokens = tokens;
  for (Layer& layer : s.routed) {
    while (layer.entries > 0 && layer.tokens.back() >= tokens) layer.tokens.pop_back(), --layer.entries;
  }
}

// Of the pool's block b entry i has the number b * block + i.
std::int32_t KvCache::number_of(const Sequence& s, std::int64_t layer, std::int64_t entry) const {
  const auto b = static_cast<std::size_t>(entry / block_);
  const Layer* r = routed(s, layer);
  const std::int64_t block =
      r != nullptr ? r->blocks.at(b)
                   : std::int64_t{s.groups.at(b)} * pool_.width() + place_[static_cast<std::size_t>(layer)];
  return static_cast<std::int32_t>(block * block_ + entry % block_);
}

void KvCache::copy(Context& c, const Copies& copies) const {
  const auto entries = static_cast<std::int64_t>(copies.to.size());
  if (entries == 0) return;
  std::vector<std::int32_t> all;
  for (const auto& of_head : copies.from) all.insert(all.end(), of_head.begin(), of_head.end());
  all.insert(all.end(), copies.to.begin(), copies.to.end());
  const Tensor both = c.empty({static_cast<std::int64_t>(all.size())}, DType::I32, MemoryTag::Data);
  from_host(c.backend(), both, all);
  const std::int64_t from = shape_.kv_heads * entries;
  c.backend().cache_copy(memory_, both.rows(0, from), both.rows(from, from + entries), entries, shape_);
}

void KvCache::append_tokens(Context& c, SequenceId to, SequenceId from, std::int64_t begin, std::int64_t end,
                            Layers layers) {
  Sequence& target = at(to);
  const Sequence& source = at(from);
  if (end <= begin) return;
  if (end > source.tokens) throw InternalError("[cache] fewer tokens than are to be copied");
  const std::int64_t first = target.tokens;
  target.tokens += end - begin;
  take_groups(target);
  Copies copies;
  copies.from.resize(static_cast<std::size_t>(shape_.kv_heads));
  const auto add = [&](std::int64_t layer, std::int64_t source_entry, std::int64_t target_entry) {
    for (auto& of_head : copies.from) of_head.push_back(number_of(source, layer, source_entry));
    copies.to.push_back(number_of(target, layer, target_entry));
  };
  for (std::size_t l = 0; l < place_.size(); ++l) {
    const auto layer = static_cast<std::int64_t>(l);
    if (!is_routed_[l]) {
      for (std::int64_t i = 0; i < end - begin; ++i) add(layer, begin + i, first + i);
    } else if (layers == Layers::All) {
      const Layer& kept = *routed(source, layer);
      Layer& more = target.routed[static_cast<std::size_t>(place_[l])];
      const std::int64_t last = entries_of(from, layer, end);
      for (std::int64_t i = entries_of(from, layer, begin); i < last; ++i) {
        make_room(target, more);
        add(layer, i, more.entries);
        add_entry(more, first + kept.tokens[static_cast<std::size_t>(i)] - begin);
      }
    }
  }
  copy(c, copies);
}

void KvCache::append_chosen(Context& c, SequenceId to, SequenceId from, std::int64_t tokens,
                            const std::vector<Chosen>& chosen) {
  Sequence& target = at(to);
  const Sequence& source = at(from);
  for (std::size_t l = 0; l < place_.size(); ++l) {
    const std::int64_t held = entries_of(from, static_cast<std::int64_t>(l), source.tokens);
    const Chosen& entries = chosen.at(l);
    if (std::any_of(entries.begin(), entries.end(), [&](auto e) { return e < 0 || e >= held; }))
      throw InternalError("[cache] an entry that a sequence does not have");
  }
  const std::int64_t first = target.tokens;
  target.tokens += tokens;
  take_groups(target);
  Copies copies;
  copies.from.resize(static_cast<std::size_t>(shape_.kv_heads));
  for (std::size_t l = 0; l < place_.size(); ++l) {
    const auto layer = static_cast<std::int64_t>(l);
    const Chosen& entries = chosen.at(l);
    const auto n = static_cast<std::int64_t>(entries.size()) / shape_.kv_heads;
    if (!is_routed_[l] && n != tokens) throw InternalError("[cache] dense layers have as many entries");
    const std::size_t before = copies.to.size();
    for (auto& of_head : copies.from) of_head.resize(before + static_cast<std::size_t>(n));
    for_pieces(shape_.kv_heads, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin * n; i < end * n; ++i)
        copies.from[static_cast<std::size_t>(i / n)][before + static_cast<std::size_t>(i % n)] =
            number_of(source, layer, entries[static_cast<std::size_t>(i)]);
    });
    for (std::int64_t i = 0; i < n; ++i) {
      std::int64_t place = first + i;
      if (is_routed_[l]) {
        Layer& more = target.routed[static_cast<std::size_t>(place_[l])];
        make_room(target, more);
        place = more.entries;
        add_entry(more, first);
      }
      copies.to.push_back(number_of(target, layer, place));
    }
  }
  copy(c, copies);
}

bool KvCache::has_room(SequenceId id, std::int64_t tokens, std::int64_t entries, std::int64_t spare) const {
  while (missing_groups(id, at(id).tokens + tokens, entries) + spare > pool_.free_groups()) {
    if (!reclaim_ || !reclaim_()) return false;
  }
  return true;
}

void KvCache::extend(SequenceId id, std::int64_t tokens) {
  Sequence& s = at(id);
  s.tokens += tokens;
  take_groups(s);
}

CacheShape KvCache::dense_shape(std::int64_t layer) const {
  const auto l = static_cast<std::size_t>(layer);
  if (is_routed_[l]) throw InternalError("[cache] a routed layer has tables of its own");
  CacheShape s = shape_;
  s.stride = pool_.width();
  s.offset = place_[l];
  s.key_means = key_means_[l];
  return s;
}

void KvCache::watch(SequenceId id) { queries_[id].resize(place_.size()); }

void KvCache::set_queries(SequenceId id, const Tensor& queries) {
  std::vector<Tensor>& by_layer = queries_.at(id);
  for (std::size_t l = 0; l < by_layer.size(); ++l) {
    const auto row = static_cast<std::int64_t>(l);
    by_layer[l] = queries.rows(row, row + 1);
  }
}

void KvCache::leave_queries(Context& c, SequenceId to, const Tensor& queries) {
  for (const auto& [id, by_layer] : queries_) {
    if (id == to || by_layer.empty() || !by_layer[0].defined() || by_layer[0].data() != queries.data())
      continue;
    const Tensor own = c.empty({queries.dim(0), queries.dim(1)});
    c.backend().copy(own, queries);
    set_queries(id, own);
  }
}

void KvCache::keep_queries(Context& c, std::int64_t layer, const Tensor& qkv) {
  const auto l = static_cast<std::size_t>(layer);
  SequenceId last = -1;  // rows of a sequence stand together
  for (std::int64_t row = qkv.dim(0); row-- > 0;) {
    const auto at_row = static_cast<std::size_t>(row);
    const auto of_pass = is_routed_[l] ? static_cast<std::size_t>(expected_rows_[at_row]) : at_row;
    const SequenceId id = row_sequence_[of_pass];
    if (std::exchange(last, id) == id) continue;
    const auto watched = queries_.find(id);
    if (watched == queries_.end()) continue;
    Tensor& query = watched->second[l];
    if (!query.defined()) query = c.empty({1, qkv.dim(1)});
    c.backend().copy(query, qkv.rows(row, row + 1));
  }
}

std::vector<float> KvCache::chunk_scores(Context& c, SequenceId id, std::int64_t layer, std::int64_t chunks,
                                         std::int64_t chunk) const {
  const auto l = static_cast<std::size_t>(layer);
  const auto watched = queries_.find(id);
  if (watched == queries_.end() || !watched->second[l].defined() || chunks == 0) return {};
  const Sequence& s = at(id);
  const Layer* r = routed(s, layer);
  const std::vector<std::int32_t>& blocks = r != nullptr ? r->blocks : s.groups;
  CacheShape shape = shape_;
  shape.sequences = 1;
  shape.table = static_cast<std::int64_t>(blocks.size());
  if (r == nullptr) shape.stride = pool_.width(), shape.offset = place_[l];
  const Tensor table = c.empty({shape.table}, DType::I32, MemoryTag::Data);
  from_host(c.backend(), table, blocks);
  const Tensor scores = c.empty_stat({shape.kv_heads * chunks});
  const ConstView row = watched->second[l];
  const ConstView query{row.data, shape.heads * shape.head_dim, row.dtype};
  c.backend().cache_chunk_scores(scores, memory_, query, table, chunks, chunk, shape);
  return to_floats(c.backend(), scores);
}

}  // namespace fathom
