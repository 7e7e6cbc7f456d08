// Attention of new rows over keys and values that earlier passes left in a pool of blocks.
//
// A block holds, for each key/value head, its keys as [head_dim, block] and then its values as [block,
// head_dim]: one query reads keys with the lanes of a vector, many queries read either with a stride. The
// arithmetic is attention_tile.h's, in its order, so a row's result has the bits of attention_forward,
// whatever the size of the blocks and the rows beside it.
#include "kernels/cpu/isa/attention_tile.h"
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/parallel.h"
#include "kernels/cpu/isa/tile_memory.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

constexpr std::int64_t kPiecesPerThread = 4;  // rows see different numbers of keys

/// The blocks of one sequence, and one key/value head in them.
template <typename T>
struct CachedHead {
  const T* pool;
  const std::int32_t* table;
  const CacheShape& s;
  std::int64_t group;

  const T* keys(std::int64_t block) const {
    return pool + s.block_of(table[block]) * s.block_elements() + group * s.head_dim * s.block;
  }
  const T* values(std::int64_t block) const { return keys(block) + s.kv_heads * s.head_dim * s.block; }

  /// body(keys, values, at, n): the entries [key + at, key + at + n) of a tile of `count` entries, block by
  /// block. Element (e, i) of the keys is keys[e * block + i], element (i, e) of the values
  /// values[i * head_dim + e].
  template <typename Body>
  void for_blocks(std::int64_t key, std::int64_t count, Body&& body) const {
    for (std::int64_t at = 0; at < count;) {
      const std::int64_t block = (key + at) / s.block, inside = (key + at) % s.block;
      const std::int64_t n = smaller(s.block - inside, count - at);
      body(keys(block) + inside, values(block) + inside * s.head_dim, at, n);
      at += n;
    }
  }
};

/// Queries of one sequence whose own entries are [tile.begin, tile.end). q: their first row's head.
template <typename T>
void attend_many(const QueryTile& tile, const CachedHead<T>& h, const T* q, std::int64_t ld, T* out,
                 std::int64_t ld_out, const ForwardScratch<T>& m) {
  constexpr int W = kLanes<T>;
  const std::int64_t d = h.s.head_dim, block = h.s.block;
  const std::int64_t width = padded<T>(tile.size());
  transpose_in<T>(m.query, kQueryTile, q, ld, tile.size(), d, static_cast<T>(h.s.scale));
  for (std::int64_t i = 0; i < d * kQueryTile; ++i) m.out[i] = 0;
  for (std::int64_t i = 0; i < width; ++i) {
    m.peak[i] = -static_cast<T>(__builtin_inf());
    m.sum[i] = 0;
  }
  for (std::int64_t key = 0; key < tile.end; key += kKeyTile) {
    const Crossing<T> x(tile, key, smaller(kKeyTile, tile.end - key));
    h.for_blocks(key, x.count, [&](const T* k, const T*, std::int64_t at, std::int64_t n) {
      tile_gemm<T>(n, x.vectors, d, {k, 1, block}, m.query, kQueryTile, m.s + at * kQueryTile, kQueryTile,
                   TileStart::Zero);
    });
    for (std::int64_t c = 0; c < x.vectors; ++c) softmax_step<T>(x, c, m);
    if (key != 0) {
      for (std::int64_t c = 0; c < width; c += W) {
        const Vec<T> rescale = load<T>(m.rescale + c);
        for (std::int64_t i = 0; i < d; ++i) {
          T* element = m.out + i * kQueryTile + c;
          store<T>(element, load<T>(element) * rescale);
        }
      }
    }
    h.for_blocks(key, x.count, [&](const T*, const T* v, std::int64_t at, std::int64_t n) {
      // Of the entries [low, high), those of this block, for the vectors of queries from c on.
      const auto part = [&](std::int64_t low, std::int64_t high, std::int64_t c) {
        low = larger(low, at), high = smaller(high, at + n);
        if (low >= high || c >= x.vectors) return;
        tile_gemm<T>(d, x.vectors - c, high - low, {v + (low - at) * d, 1, d}, m.s + low * kQueryTile + c * W,
                     kQueryTile, m.out + c * W, kQueryTile, TileStart::Accumulate);
      };
      part(0, x.seen_by_all(), 0);
      for (std::int64_t c = 0; c < x.vectors; ++c) {
        const std::int64_t low = larger(x.low(c), at), high = smaller(x.high(c), at + n);
        if (low >= high) continue;
        tile_gemm_causal<T>(d, high - low, {v + (low - at) * d, 1, d}, m.s + low * kQueryTile + c * W,
                            kQueryTile, m.out + c * W, kQueryTile, x.diagonal(c) + low);
        part(low, high, c + 1);
      }
    });
  }
  for (std::int64_t i = 0; i < width; ++i) m.rescale[i] = T(1) / m.sum[i];
  transpose_out<T>(out, ld_out, m.out, kQueryTile, tile.size(), d, m.rescale);
}

/// What one query's head has of its online softmax, and the products with the values.
template <typename T>
struct OneScratch {
  OneScratch(void* memory, std::int64_t heads, std::int64_t head_dim) {
    Parts parts(memory);
    query = parts.take<T>(heads * head_dim);
    out = parts.take<T>(heads * head_dim);
    s = parts.take<T>(kKeyTile);
    peak = parts.take<T>(heads);
    sum = parts.take<T>(heads);
  }
  static std::int64_t bytes(std::int64_t heads, std::int64_t head_dim) {
    return 2 * part_bytes<T>(heads * head_dim) + part_bytes<T>(kKeyTile) + 2 * part_bytes<T>(heads);
  }
  T *query, *out, *s, *peak, *sum;
};

/// s[i] = sum over e of q[e] * k[e * block + i]: the lanes are entries. Past n up to whole vectors, which lie
/// in the same block, it is what memory gives.
template <typename T, int vectors>
void one_scores(T* s, const T* q, const T* k, std::int64_t d, std::int64_t block) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[vectors] = {};
  for (std::int64_t e = 0; e < d; ++e) {
    const Vec<T> x = broadcast<T>(q[e]);
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) sum[i] += x * load<T>(k + e * block + i * W);
  }
#pragma GCC unroll 8
  for (int i = 0; i < vectors; ++i) store<T>(s + i * W, sum[i]);
}

/// out[e] += sum over i < n of p[i] * v[i * d + e], for `vectors` vectors of e.
template <typename T, int vectors>
void one_weigh(T* out, const T* p, const T* v, std::int64_t n, std::int64_t d) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[vectors];
#pragma GCC unroll 8
  for (int c = 0; c < vectors; ++c) sum[c] = load<T>(out + c * W);
  for (std::int64_t i = 0; i < n; ++i) {
    const Vec<T> x = broadcast<T>(p[i]);
#pragma GCC unroll 8
    for (int c = 0; c < vectors; ++c) sum[c] += x * load<T>(v + i * d + c * W);
  }
#pragma GCC unroll 8
  for (int c = 0; c < vectors; ++c) store<T>(out + c * W, sum[c]);
}

/// The same for the last `rest` elements. In vectors as well: the compiler makes of scalars another rounding.
template <typename T>
void one_weigh_rest(T* out, const T* p, const T* v, std::int64_t n, std::int64_t d, std::int64_t rest) {
  T lanes[kLanes<T>] = {};
  for (std::int64_t e = 0; e < rest; ++e) lanes[e] = out[e];
  Vec<T> sum = load<T>(lanes);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t e = 0; e < rest; ++e) lanes[e] = v[i * d + e];
    sum += broadcast<T>(p[i]) * load<T>(lanes);
  }
  for (std::int64_t e = 0; e < rest; ++e) out[e] = sum[e];
}

template <typename T>
void one_step(const CachedHead<T>& h, std::int64_t key, std::int64_t count, std::int64_t head,
              const OneScratch<T>& m) {
  constexpr int W = kLanes<T>;
  const std::int64_t d = h.s.head_dim, block = h.s.block;
  const T* query = m.query + head * d;
  T* out = m.out + head * d;
  h.for_blocks(key, count, [&](const T* k, const T*, std::int64_t at, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + 4 * W <= padded<T>(n); i += 4 * W) one_scores<T, 4>(m.s + at + i, query, k + i, d, block);
    for (; i < n; i += W) one_scores<T, 1>(m.s + at + i, query, k + i, d, block);
  });
  T peak = m.peak[head];
  for (std::int64_t j = 0; j < count; ++j) peak = m.s[j] > peak ? m.s[j] : peak;
  const T rescale = vexp(m.peak[head] - peak);
  for (std::int64_t j = 0; j < count; ++j) m.s[j] = vexp(m.s[j] - peak);
  T sum = m.sum[head] * rescale;
  for (std::int64_t j = 0; j < count; ++j) sum += m.s[j];
  m.peak[head] = peak;
  m.sum[head] = sum;
  if (key != 0) {
    for (std::int64_t e = 0; e < d; ++e) out[e] *= rescale;
  }
  h.for_blocks(key, count, [&](const T*, const T* v, std::int64_t at, std::int64_t n) {
    std::int64_t e = 0;
    for (; e + 4 * W <= d; e += 4 * W) one_weigh<T, 4>(out + e, m.s + at, v + e, n, d);
    for (; e + W <= d; e += W) one_weigh<T, 1>(out + e, m.s + at, v + e, n, d);
    if (e < d) one_weigh_rest<T>(out + e, m.s + at, v + e, n, d, d - e);
  });
}

/// One query, all query heads of a group: the entries are read from memory once.
template <typename T>
void attend_one(std::int64_t length, const CachedHead<T>& h, const T* q, T* out, const OneScratch<T>& m) {
  const std::int64_t d = h.s.head_dim, heads = h.s.heads / h.s.kv_heads;
  const T scale = static_cast<T>(h.s.scale);
  for (std::int64_t i = 0; i < heads * d; ++i) {
    m.query[i] = q[i] * scale;
    m.out[i] = 0;
  }
  for (std::int64_t i = 0; i < heads; ++i) {
    m.peak[i] = -static_cast<T>(__builtin_inf());
    m.sum[i] = 0;
  }
  for (std::int64_t key = 0; key < length; key += kKeyTile) {
    for (std::int64_t i = 0; i < heads; ++i) one_step<T>(h, key, smaller(kKeyTile, length - key), i, m);
  }
  for (std::int64_t i = 0; i < heads; ++i) {
    const T whole = T(1) / m.sum[i];
    for (std::int64_t e = 0; e < d; ++e) out[i * d + e] = m.out[i * d + e] * whole;
  }
}

/// Rows [row, row + size): of one sequence, with entries one after the other.
struct RowTile {
  std::int64_t row;
  std::int64_t size;
};

struct CacheRows {
  const std::int32_t* tables;
  const std::int32_t* sequences;
  const std::int32_t* lengths;

  CacheRows(const char* op, ConstView t, ConstView q, ConstView l, const CacheShape& s)
      : tables(input<std::int32_t>(op, "tables", t, s.sequences * s.table)),
        sequences(input<std::int32_t>(op, "sequences", q, s.rows)),
        lengths(input<std::int32_t>(op, "lengths", l, s.rows)) {
    if (s.kv_heads < 1) fail(op, "kv_heads", s.kv_heads, 1);
    check_size(op, "heads modulo kv_heads", s.heads % s.kv_heads, 0);
    check_size(op, "block modulo 16", s.block % 16, 0);
    check_indices(op, "a sequence", sequences, s.rows, 0, s.sequences);
    check_indices(op, "a length", lengths, s.rows, 1, s.table * s.block + 1);
    for (std::int64_t i = 0; i < s.rows; ++i) {
      const std::int32_t* table = tables + sequences[i] * s.table;
      for (std::int64_t b = 0; b < (lengths[i] + s.block - 1) / s.block; ++b) {
        const std::int64_t block = s.block_of(table[b]);
        if (table[b] < 0 || block >= s.blocks) fail(op, "a block of a table", block, s.blocks);
      }
    }
  }
};

std::int64_t qkv_size(const CacheShape& s) { return s.rows * (s.heads + 2 * s.kv_heads) * s.head_dim; }

template <typename T>
void append(T* pool, const T* qkv, const CacheRows& r, const CacheShape& s) {
  const std::int64_t d = s.head_dim, ld = (s.heads + 2 * s.kv_heads) * d;
  parallel_for(s.rows, 16, [=, &r, &s](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t entry = r.lengths[i] - 1;
      const std::int32_t block = r.tables[r.sequences[i] * s.table + entry / s.block];
      T* keys = pool + s.block_of(block) * s.block_elements() + entry % s.block;
      T* values =
          pool + s.block_of(block) * s.block_elements() + s.kv_heads * d * s.block + entry % s.block * d;
      const T* k = qkv + i * ld + s.heads * d;
      const T* v = k + s.kv_heads * d;
      for (std::int64_t g = 0; g < s.kv_heads; ++g) {
        for (std::int64_t e = 0; e < d; ++e) {
          keys[(g * d + e) * s.block] = k[g * d + e];
          values[g * s.block * d + e] = v[g * d + e];
        }
      }
    }
  });
}

template <typename T>
void attend(T* out, const T* pool, const T* qkv, const CacheRows& r, const CacheShape& s) {
  const std::int64_t d = s.head_dim, ld = (s.heads + 2 * s.kv_heads) * d, ld_out = s.heads * d;
  const std::int64_t group = s.heads / s.kv_heads;
  const TileMemory list(part_bytes<RowTile>(s.rows));
  Parts parts(list.data());
  RowTile* tiles = parts.take<RowTile>(s.rows);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < s.rows; ++i) {
    const bool follows =
        i > 0 && r.sequences[i] == r.sequences[i - 1] && r.lengths[i] == r.lengths[i - 1] + 1;
    if (follows && tiles[count - 1].size < kQueryTile) {
      ++tiles[count - 1].size;
    } else {
      tiles[count++] = {i, 1};
    }
  }
  const std::int64_t items = count * s.kv_heads;
  const std::int64_t pieces = threads() * kPiecesPerThread;
  const std::int64_t grain = (items + pieces - 1) / pieces;
  const std::int64_t bytes = larger(ForwardScratch<T>::bytes(d), OneScratch<T>::bytes(group, d));
  const TileMemory memory((items + grain - 1) / grain * bytes);
  parallel_for(items, grain, [&](std::int64_t begin, std::int64_t end) {
    void* own = static_cast<char*>(memory.data()) + begin / grain * bytes;
    for (std::int64_t item = begin; item < end; ++item) {
      const RowTile tile = tiles[item / s.kv_heads];
      const std::int64_t g = item % s.kv_heads;
      const CachedHead<T> head{pool, r.tables + r.sequences[tile.row] * s.table, s, g};
      const T* q = qkv + tile.row * ld + g * group * d;
      T* to = out + tile.row * ld_out + g * group * d;
      const std::int64_t first = r.lengths[tile.row] - 1;
      if (tile.size == 1) {
        attend_one<T>(first + 1, head, q, to, OneScratch<T>(own, group, d));
        continue;
      }
      for (std::int64_t h = 0; h < group; ++h) {
        attend_many<T>({first, first + tile.size, 0}, head, q + h * d, ld, to + h * d, ld_out,
                       ForwardScratch<T>(own, d));
      }
    }
  });
}

}  // namespace

void CpuBackend::cache_append(View pool, ConstView qkv, ConstView tables, ConstView sequences,
                              ConstView lengths, const CacheShape& s) {
  const char* op = "cache_append";
  for_compute_type(op, pool.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>(op, "pool", pool, s.blocks * s.block_elements());
    const T* from = input<T>(op, "qkv", qkv, qkv_size(s));
    append<T>(to, from, CacheRows(op, tables, sequences, lengths, s), s);
  });
}

void CpuBackend::cached_attention(View out, ConstView pool, ConstView qkv, ConstView tables,
                                  ConstView sequences, ConstView lengths, const CacheShape& s) {
  const char* op = "cached_attention";
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>(op, "out", out, s.rows * s.heads * s.head_dim);
    const T* cache = input<T>(op, "pool", pool, s.blocks * s.block_elements());
    const T* q = input<T>(op, "qkv", qkv, qkv_size(s));
    attend<T>(to, cache, q, CacheRows(op, tables, sequences, lengths, s), s);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
