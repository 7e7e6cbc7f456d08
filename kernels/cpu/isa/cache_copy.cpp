// Entries of a pool of blocks to other places of it, and how well chunks of them suit a query.
#include "kernels/cpu/isa/cached_heads.h"
#include "kernels/cpu/isa/cached_rows.h"
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/parallel.h"
#include "kernels/cpu/isa/tile_memory.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

constexpr std::int64_t kGrain = 64;         // entries
constexpr std::int64_t kChunksAtOnce = 64;  // so that a part begins with a whole tile, whatever a chunk is

/// Head g of an entry: its keys every `block` elements, its values side by side.
template <typename T>
struct EntryNumbers {
  T* pool;
  const CacheShape& s;

  void copy(std::int64_t g, std::int64_t from, std::int64_t to) const {
    const std::int64_t d = s.head_dim;
    const T* k = keys(g, from);
    T* key = keys(g, to);
    for (std::int64_t e = 0; e < d; ++e) key[e * s.block] = k[e * s.block];
    const T* v = values(g, from);
    T* value = values(g, to);
    for (std::int64_t e = 0; e < d; ++e) value[e] = v[e];
  }

 private:
  T* block(std::int64_t entry) const { return pool + entry / s.block * s.block_elements(); }
  T* keys(std::int64_t g, std::int64_t entry) const {
    return block(entry) + g * s.head_dim * s.block + entry % s.block;
  }
  T* values(std::int64_t g, std::int64_t entry) const {
    return block(entry) + ((s.kv_heads + g) * s.block + entry % s.block) * s.head_dim;
  }
};

/// The same of codes and scales.
struct EntryCodes {
  std::uint8_t* pool;
  const CacheShape& s;

  void copy(std::int64_t g, std::int64_t from, std::int64_t to) const {
    const std::int64_t bytes = cache_code_bytes(s.head_dim, s.bits);
    const std::uint8_t* k = block(from) + g * s.block * bytes + from % s.block;
    std::uint8_t* key = block(to) + g * s.block * bytes + to % s.block;
    for (std::int64_t b = 0; b < bytes; ++b) key[b * s.block] = k[b * s.block];
    const std::uint8_t* v = block(from) + ((s.kv_heads + g) * s.block + from % s.block) * bytes;
    std::uint8_t* value = block(to) + ((s.kv_heads + g) * s.block + to % s.block) * bytes;
    for (std::int64_t b = 0; b < bytes; ++b) value[b] = v[b];
    for (const std::int64_t head : {g, s.kv_heads + g}) *scale(head, to) = *scale(head, from);
  }

 private:
  std::uint8_t* block(std::int64_t entry) const { return pool + entry / s.block * s.block_elements(); }
  std::uint32_t* scale(std::int64_t head, std::int64_t entry) const {
    const std::int64_t codes = 2 * s.kv_heads * s.block * cache_code_bytes(s.head_dim, s.bits);
    return reinterpret_cast<std::uint32_t*>(block(entry) + codes) + head * s.block + entry % s.block;
  }
};

template <typename Entries>
void copy_entries(const Entries& pool, const std::int32_t* from, const std::int32_t* to, std::int64_t entries,
                  const CacheShape& s) {
  parallel_for(s.kv_heads * entries, kGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) pool.copy(i / entries, from[i], to[i % entries]);
  });
}

template <typename T, typename Head>
void chunk_scores(T* scores, decltype(Head::pool) pool, const T* query, const std::int32_t* table,
                  std::int64_t chunks, std::int64_t chunk, const CacheShape& s) {
  const std::int64_t d = s.head_dim, group = s.heads / s.kv_heads;
  const std::int64_t parts = (chunks + kChunksAtOnce - 1) / kChunksAtOnce;
  const std::int64_t each =
      part_bytes<T>(d) + part_bytes<T>(kKeyTile) + part_bytes<T>(Head::tile_elements(s));
  const TileMemory memory(parts * s.kv_heads * each);
  parallel_for(parts * s.kv_heads, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t item = begin; item < end; ++item) {
      Parts own(static_cast<char*>(memory.data()) + item * each);
      T* q = own.template take<T>(d);
      T* sums = own.template take<T>(kKeyTile);
      T* tile = own.template take<T>(Head::tile_elements(s));
      const std::int64_t g = item / parts, first = item % parts * kChunksAtOnce;
      const std::int64_t last = smaller(first + kChunksAtOnce, chunks);
      for (std::int64_t e = 0; e < d; ++e) {
        q[e] = 0;
        for (std::int64_t h = 0; h < group; ++h) q[e] += query[(g * group + h) * d + e];
      }
      T* to = scores + g * chunks;
      for (std::int64_t c = first; c < last; ++c) to[c] = 0;
      const Head head{pool, table, s, g};
      for (std::int64_t key = first * chunk; key < last * chunk; key += kKeyTile) {
        const std::int64_t count = smaller(kKeyTile, last * chunk - key);
        head.for_keys(key, count, tile,
                      [&](const T* k, std::int64_t stride, std::int64_t at, std::int64_t n) {
                        for (std::int64_t i = 0; i < n; ++i) sums[at + i] = 0;
                        for (std::int64_t e = 0; e < d; ++e) {
                          for (std::int64_t i = 0; i < n; ++i) sums[at + i] += q[e] * k[e * stride + i];
                        }
                      });
        for (std::int64_t i = 0; i < count; ++i) to[(key + i) / chunk] += sums[i];
      }
      for (std::int64_t c = first; c < last; ++c) to[c] /= static_cast<T>(chunk);
    }
  });
}

}  // namespace

void CpuBackend::cache_copy(View pool, ConstView from, ConstView to, std::int64_t entries,
                            const CacheShape& s) {
  const char* op = "cache_copy";
  const auto* source = input<std::int32_t>(op, "from", from, s.kv_heads * entries);
  const auto* target = input<std::int32_t>(op, "to", to, entries);
  check_indices(op, "an entry to copy", source, s.kv_heads * entries, 0, s.blocks * s.block);
  check_indices(op, "an entry's place", target, entries, 0, s.blocks * s.block);
  const std::int64_t size = s.blocks * s.block_elements();
  if (s.bits < 16) {
    copy_entries(EntryCodes{output<std::uint8_t>(op, "pool", pool, size), s}, source, target, entries, s);
    return;
  }
  for_compute_type(op, pool.dtype, [&](auto zero) {
    using T = decltype(zero);
    copy_entries(EntryNumbers<T>{output<T>(op, "pool", pool, size), s}, source, target, entries, s);
  });
}

void CpuBackend::cache_chunk_scores(View scores, ConstView pool, ConstView query, ConstView table,
                                    std::int64_t chunks, std::int64_t chunk, const CacheShape& s) {
  const char* op = "cache_chunk_scores";
  for_compute_type(op, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>(op, "scores", scores, s.kv_heads * chunks);
    const T* q = input<T>(op, "query", query, s.heads * s.head_dim);
    const auto* blocks = input<std::int32_t>(op, "table", table, s.table);
    if (chunk < 1 || chunks * chunk > s.table * s.block)
      fail(op, "chunks", chunks * chunk, s.table * s.block);
    for (std::int64_t b = 0; b < (chunks * chunk + s.block - 1) / s.block; ++b) {
      if (blocks[b] < 0 || s.block_of(blocks[b]) >= s.blocks)
        fail(op, "a block of the table", s.block_of(blocks[b]), s.blocks);
    }
    const std::int64_t size = s.blocks * s.block_elements();
    if (s.bits == 16) {
      chunk_scores<T, CachedNumbers<T>>(to, input<T>(op, "pool", pool, size), q, blocks, chunks, chunk, s);
      return;
    }
    const auto* codes = input<std::uint8_t>(op, "pool", pool, size);
    if (s.bits == 4) {
      chunk_scores<T, CachedCodes<T, 4>>(to, codes, q, blocks, chunks, chunk, s);
    } else {
      chunk_scores<T, CachedCodes<T, 8>>(to, codes, q, blocks, chunks, chunk, s);
    }
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
