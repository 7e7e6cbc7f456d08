// Attention of new rows over keys and values that earlier passes left in a pool of blocks.
//
// Of each key/value head keys are [head_dim, entries] and values [entries, head_dim] (cached_heads.h): one
// query reads keys with the lanes of a vector, many queries read either with a stride. The arithmetic is
// attention_tile.h's, in its order, so a row's result has the bits of attention_forward, whatever the size of
// the blocks and the rows beside it.
#include "kernels/cpu/isa/attention_tile.h"
#include "kernels/cpu/isa/cached_heads.h"
#include "kernels/cpu/isa/cached_rows.h"
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/parallel.h"
#include "kernels/cpu/isa/tile_memory.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

constexpr std::int64_t kPiecesPerThread = 4;  // rows see different numbers of keys

/// Queries of one sequence whose own entries are [tile.begin, tile.end). q: their first row's head.
/// entries: room for a tile of them.
template <typename T, typename Head>
void attend_many(const QueryTile& tile, const Head& h, const T* q, std::int64_t ld, T* out,
                 std::int64_t ld_out, const ForwardScratch<T>& m, T* entries) {
  constexpr int W = kLanes<T>;
  const std::int64_t d = h.s.head_dim;
  const std::int64_t width = padded<T>(tile.size());
  transpose_in<T>(m.query, kQueryTile, q, ld, tile.size(), d, static_cast<T>(h.s.scale));
  for (std::int64_t i = 0; i < d * kQueryTile; ++i) m.out[i] = 0;
  for (std::int64_t i = 0; i < width; ++i) {
    m.peak[i] = -static_cast<T>(__builtin_inf());
    m.sum[i] = 0;
  }
  for (std::int64_t key = 0; key < tile.end; key += kKeyTile) {
    const Crossing<T> x(tile, key, smaller(kKeyTile, tile.end - key));
    h.for_keys(key, x.count, entries, [&](const T* k, std::int64_t stride, std::int64_t at, std::int64_t n) {
      tile_gemm<T>(n, x.vectors, d, {k, 1, stride}, m.query, kQueryTile, m.s + at * kQueryTile, kQueryTile,
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
    h.for_values(key, x.count, entries, [&](const T* v, std::int64_t, std::int64_t at, std::int64_t n) {
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
    s = parts.take<T>(heads * kKeyTile);
    peak = parts.take<T>(heads);
    sum = parts.take<T>(heads);
  }
  static std::int64_t bytes(std::int64_t heads, std::int64_t head_dim) {
    return 2 * part_bytes<T>(heads * head_dim) + part_bytes<T>(heads * kKeyTile) + 2 * part_bytes<T>(heads);
  }
  T *query, *out, *s, *peak, *sum;
};

/// s[i] = sum over e of q[e] * k[e * stride + i]: the lanes are entries. Past n up to whole vectors, which
/// lie in the same block, it is what memory gives.
template <typename T, int vectors>
void one_scores(T* s, const T* q, const T* k, std::int64_t d, std::int64_t stride) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[vectors] = {};
  for (std::int64_t e = 0; e < d; ++e) {
    const Vec<T> x = broadcast<T>(q[e]);
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) sum[i] += x * load<T>(k + e * stride + i * W);
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

/// The scores of one head with the keys of a part of a tile.
template <typename T>
void one_part(T* s, const T* query, const T* k, std::int64_t d, std::int64_t stride, std::int64_t n) {
  constexpr int W = kLanes<T>;
  std::int64_t i = 0;
  for (; i + 4 * W <= padded<T>(n); i += 4 * W) one_scores<T, 4>(s + i, query, k + i, d, stride);
  for (; i < n; i += W) one_scores<T, 1>(s + i, query, k + i, d, stride);
}

/// Scores to exponentials; what was summed before shrinks with the peak.
template <typename T>
void one_softmax(std::int64_t head, std::int64_t count, bool first, std::int64_t d, const OneScratch<T>& m) {
  T* s = m.s + head * kKeyTile;
  T* out = m.out + head * d;
  T peak = m.peak[head];
  for (std::int64_t j = 0; j < count; ++j) peak = s[j] > peak ? s[j] : peak;
  const T rescale = vexp(m.peak[head] - peak);
  for (std::int64_t j = 0; j < count; ++j) s[j] = vexp(s[j] - peak);
  T sum = m.sum[head] * rescale;
  for (std::int64_t j = 0; j < count; ++j) sum += s[j];
  m.peak[head] = peak;
  m.sum[head] = sum;
  if (first) return;
  for (std::int64_t e = 0; e < d; ++e) out[e] *= rescale;
}

/// The values of a part of a tile.
template <typename T>
void one_add(T* out, const T* p, const T* v, std::int64_t n, std::int64_t d) {
  constexpr int W = kLanes<T>;
  std::int64_t e = 0;
  for (; e + 4 * W <= d; e += 4 * W) one_weigh<T, 4>(out + e, p, v + e, n, d);
  for (; e + W <= d; e += W) one_weigh<T, 1>(out + e, p, v + e, n, d);
  if (e < d) one_weigh_rest<T>(out + e, p, v + e, n, d, d - e);
}

/// One query, all query heads of a group: the entries are read from memory once.
template <typename T, typename Head>
void attend_one(std::int64_t length, const Head& h, const T* q, T* out, const OneScratch<T>& m, T* entries) {
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
    const std::int64_t count = smaller(kKeyTile, length - key);
    h.for_keys(key, count, entries, [&](const T* k, std::int64_t stride, std::int64_t at, std::int64_t n) {
      for (std::int64_t i = 0; i < heads; ++i)
        one_part<T>(m.s + i * kKeyTile + at, m.query + i * d, k, d, stride, n);
    });
    for (std::int64_t i = 0; i < heads; ++i) one_softmax<T>(i, count, key == 0, d, m);
    h.for_values(key, count, entries, [&](const T* v, std::int64_t, std::int64_t at, std::int64_t n) {
      for (std::int64_t i = 0; i < heads; ++i) one_add<T>(m.out + i * d, m.s + i * kKeyTile + at, v, n, d);
    });
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

template <typename T, typename Head>
void attend(T* out, decltype(Head::pool) pool, const T* qkv, const CacheRows& r, const CacheShape& s) {
  const std::int64_t d = s.head_dim, ld = packed_row(s), ld_out = s.heads * d;
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
  const std::int64_t entries = part_bytes<T>(Head::tile_elements(s));
  const std::int64_t bytes = entries + larger(ForwardScratch<T>::bytes(d), OneScratch<T>::bytes(group, d));
  const TileMemory memory((items + grain - 1) / grain * bytes);
  parallel_for(items, grain, [&](std::int64_t begin, std::int64_t end) {
    char* own = static_cast<char*>(memory.data()) + begin / grain * bytes;
    T* tile_of_entries = reinterpret_cast<T*>(own);
    own += entries;
    for (std::int64_t item = begin; item < end; ++item) {
      const RowTile tile = tiles[item / s.kv_heads];
      const std::int64_t g = item % s.kv_heads;
      const Head head{pool, r.tables + r.sequences[tile.row] * s.table, s, g};
      const T* q = qkv + tile.row * ld + g * group * d;
      T* to = out + tile.row * ld_out + g * group * d;
      const std::int64_t first = r.lengths[tile.row] - 1;
      if (tile.size == 1) {
        attend_one<T>(first + 1, head, q, to, OneScratch<T>(own, group, d), tile_of_entries);
        continue;
      }
      for (std::int64_t h = 0; h < group; ++h) {
        attend_many<T>({first, first + tile.size, 0}, head, q + h * d, ld, to + h * d, ld_out,
                       ForwardScratch<T>(own, d), tile_of_entries);
      }
    }
  });
}

}  // namespace

void CpuBackend::cached_attention(View out, ConstView pool, ConstView qkv, ConstView tables,
                                  ConstView sequences, ConstView lengths, const CacheShape& s) {
  const char* op = "cached_attention";
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>(op, "out", out, s.rows * s.heads * s.head_dim);
    const T* q = input<T>(op, "qkv", qkv, s.rows * packed_row(s));
    const CacheRows rows(op, tables, sequences, lengths, s);
    const std::int64_t size = s.blocks * s.block_elements();
    if (s.bits == 16) {
      attend<T, CachedNumbers<T>>(to, input<T>(op, "pool", pool, size), q, rows, s);
      return;
    }
    const auto* codes = input<std::uint8_t>(op, "pool", pool, size);
    if (s.bits == 4) {
      attend<T, CachedCodes<T, 4>>(to, codes, q, rows, s);
    } else {
      attend<T, CachedCodes<T, 8>>(to, codes, q, rows, s);
    }
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
