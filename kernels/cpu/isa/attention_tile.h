// Causal attention of a tile of queries against the keys that it sees, without ever holding more scores than
// one tile (FlashAttention: Dao et al. 2022; online softmax: Milakov & Gimelshein 2018).
//
// The lanes of a vector are queries. Scores are kept as S[key][query], so that softmax is elementwise and
// sums over keys run in ascending order in each lane. Key tiles are counted from the first key that the query
// sees. A query's result is therefore a function of its own row and of the keys and values that it sees, in
// bits: the number of queries, their tiling, the place of the sequence in the batch and the threads do not
// enter.
//
// Backward, with P = exp(S - lse) and delta_i = sum(dout_i * out_i):
//   dV_j = sum_i P_ij dout_i,   dS_ij = P_ij (dout_i . v_j - delta_i),
//   dQ_i = scale * sum_j dS_ij k_j,   dK_j = scale * sum_i dS_ij q_i.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa/tile_gemm.h"
#include "kernels/cpu/isa/tile_memory.h"
#include "kernels/cpu/isa/transpose.h"
#include "kernels/cpu/isa/vector_math.h"

namespace fathom::cpu::FATHOM_ISA {

constexpr std::int64_t kQueryTile = 64;
constexpr std::int64_t kKeyTile = 64;

/// Queries [begin, end) of one sequence, all of which see the keys from `first` to themselves.
struct QueryTile {
  std::int64_t begin;
  std::int64_t end;
  std::int64_t first;

  std::int64_t size() const { return end - begin; }
};

/// One head of one sequence inside the packed rows; `ld` is a packed row's size.
template <typename T>
struct HeadRows {
  const T* q;
  const T* k;
  const T* v;
  std::int64_t ld;
  std::int64_t head_dim;
};

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
inline std::int64_t clamp(std::int64_t x, std::int64_t low, std::int64_t high) {
  return smaller(larger(x, low), high);
}
template <typename T>
constexpr std::int64_t padded(std::int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

/// Where the causal diagonal crosses keys [begin, begin + count) of a query tile: keys before the tile's
/// first query are seen by all; after them, the W keys of each vector of queries are seen by a triangle of
/// that vector, and by all of the vectors that follow.
template <typename T>
struct Crossing {
  static constexpr int W = kLanes<T>;
  Crossing(const QueryTile& t, std::int64_t key_begin, std::int64_t key_count)
      : tile(t), begin(key_begin), count(key_count), vectors((t.size() + W - 1) / W) {}

  QueryTile tile;
  std::int64_t begin;
  std::int64_t count;
  std::int64_t vectors;

  std::int64_t seen_by_all() const { return clamp(tile.begin - begin, 0, count); }
  /// The triangle of vector c: its keys relative to `begin`, [low, high).
  std::int64_t low(std::int64_t c) const { return clamp(tile.begin + c * W - begin, 0, count); }
  std::int64_t high(std::int64_t c) const { return clamp(tile.begin + (c + 1) * W - begin, 0, count); }
  /// The lane of vector c whose query is key `begin` itself; below it, the key is in the future.
  std::int64_t diagonal(std::int64_t c) const { return begin - tile.begin - c * W; }
};

/// S[key][query] = rows[key] . columns[:, query], for the pairs where the query sees the key (and some more).
template <typename T>
void scores(const Crossing<T>& x, const T* rows, std::int64_t ld, std::int64_t head_dim, const T* columns,
            T* s) {
  const auto part = [&](std::int64_t low, std::int64_t high, std::int64_t c) {
    if (low >= high) return;
    tile_gemm<T>(high - low, x.vectors - c, head_dim, {rows + low * ld, ld, 1}, columns + c * kLanes<T>,
                 kQueryTile, s + low * kQueryTile + c * kLanes<T>, kQueryTile, TileStart::Zero);
  };
  part(0, x.seen_by_all(), 0);
  for (std::int64_t c = 0; c < x.vectors; ++c) part(x.low(c), x.high(c), c);
}

/// out[:, query] += sum over the keys that the query sees of rows[key] * p[key][query].
template <typename T>
void weigh_rows(const Crossing<T>& x, const T* rows, std::int64_t ld, std::int64_t head_dim, const T* p,
                T* out) {
  constexpr int W = kLanes<T>;
  const auto part = [&](std::int64_t low, std::int64_t high, std::int64_t c) {
    if (low >= high || c >= x.vectors) return;
    tile_gemm<T>(head_dim, x.vectors - c, high - low, {rows + low * ld, 1, ld}, p + low * kQueryTile + c * W,
                 kQueryTile, out + c * W, kQueryTile, TileStart::Accumulate);
  };
  part(0, x.seen_by_all(), 0);
  for (std::int64_t c = 0; c < x.vectors; ++c) {
    const std::int64_t low = x.low(c);
    const std::int64_t high = x.high(c);
    if (low >= high) continue;
    tile_gemm_causal<T>(head_dim, high - low, {rows + low * ld, 1, ld}, p + low * kQueryTile + c * W,
                        kQueryTile, out + c * W, kQueryTile, x.diagonal(c) + low);
    part(low, high, c + 1);
  }
}

/// out[key] += sum over the queries that see the key of p[key][query] * rows[query].
template <typename T>
void gather_columns(const Crossing<T>& x, const T* p, const T* rows, std::int64_t ld, std::int64_t vectors,
                    T* out, std::int64_t ld_out) {
  const auto part = [&](std::int64_t low, std::int64_t high, std::int64_t query) {
    if (low >= high) return;
    tile_gemm<T>(high - low, vectors, x.tile.size() - query, {p + low * kQueryTile + query, kQueryTile, 1},
                 rows + query * ld, ld, out + low * ld_out, ld_out, TileStart::Accumulate);
  };
  part(0, x.seen_by_all(), 0);
  for (std::int64_t c = 0; c < x.vectors; ++c) part(x.low(c), x.high(c), c * kLanes<T>);
}

template <typename T>
struct ForwardScratch {
  ForwardScratch(void* memory, std::int64_t head_dim) {
    Parts parts(memory);
    query = parts.take<T>(head_dim * kQueryTile);
    out = parts.take<T>(head_dim * kQueryTile);
    s = parts.take<T>(kKeyTile * kQueryTile);
    peak = parts.take<T>(kQueryTile);
    sum = parts.take<T>(kQueryTile);
    rescale = parts.take<T>(kQueryTile);
  }
  static std::int64_t bytes(std::int64_t head_dim) {
    return 2 * part_bytes<T>(head_dim * kQueryTile) + part_bytes<T>(kKeyTile * kQueryTile) +
           3 * part_bytes<T>(kQueryTile);
  }
  T *query, *out, *s, *peak, *sum, *rescale;
};

/// The online softmax of vector c of queries: scores become exp(score - peak), 0 where the key is in the
/// future.
template <typename T>
void softmax_step(const Crossing<T>& x, std::int64_t c, const ForwardScratch<T>& m) {
  constexpr int W = kLanes<T>;
  using Index = typename LaneIndex<T>::type;
  const IndexVec<T> lanes = lane_numbers<T>();
  T* column = m.s + c * W;
  const std::int64_t seen = x.high(c);
  const std::int64_t seen_by_all = clamp(x.tile.begin + c * W - x.begin + 1, 0, seen);
  const Vec<T> old_peak = load<T>(m.peak + c * W);
  Vec<T> peak = old_peak;
  for (std::int64_t j = 0; j < seen_by_all; ++j) {
    const Vec<T> s = load<T>(column + j * kQueryTile);
    peak = s > peak ? s : peak;
  }
  for (std::int64_t j = seen_by_all; j < seen; ++j) {
    const Vec<T> s = load<T>(column + j * kQueryTile);
    peak = ((s > peak) & (lanes >= static_cast<Index>(x.diagonal(c) + j))) ? s : peak;
  }
  T work[W];
  store<T>(work, old_peak - peak);
  for (int l = 0; l < W; ++l) work[l] = vexp(work[l]);
  const Vec<T> rescale = load<T>(work);
  Vec<T> sum = load<T>(m.sum + c * W) * rescale;
  for (std::int64_t j = 0; j < seen; ++j) {
    store<T>(work, load<T>(column + j * kQueryTile) - peak);
    for (int l = 0; l < W; ++l) work[l] = vexp(work[l]);
    Vec<T> p = load<T>(work);
    if (j >= seen_by_all) p = lanes >= static_cast<Index>(x.diagonal(c) + j) ? p : Vec<T>{};
    sum += p;
    store<T>(column + j * kQueryTile, p);
  }
  store<T>(m.peak + c * W, peak);
  store<T>(m.sum + c * W, sum);
  store<T>(m.rescale + c * W, rescale);
}

/// out: the head's columns of the output rows of the sequence; lse: the head's row [T].
template <typename T>
void attend_forward(const QueryTile& tile, const HeadRows<T>& h, T scale, T* out, std::int64_t ld_out, T* lse,
                    const ForwardScratch<T>& m) {
  constexpr int W = kLanes<T>;
  const std::int64_t d = h.head_dim;
  const std::int64_t width = padded<T>(tile.size());
  transpose_in<T>(m.query, kQueryTile, h.q + tile.begin * h.ld, h.ld, tile.size(), d, scale);
  for (std::int64_t i = 0; i < d * kQueryTile; ++i) m.out[i] = 0;
  for (std::int64_t i = 0; i < width; ++i) {
    m.peak[i] = -static_cast<T>(__builtin_inf());
    m.sum[i] = 0;
  }
  for (std::int64_t key = tile.first; key < tile.end; key += kKeyTile) {
    const Crossing<T> x(tile, key, smaller(kKeyTile, tile.end - key));
    scores<T>(x, h.k + key * h.ld, h.ld, d, m.query, m.s);
    for (std::int64_t c = 0; c < x.vectors; ++c) softmax_step<T>(x, c, m);
    if (key != tile.first) {
      for (std::int64_t c = 0; c < width; c += W) {
        const Vec<T> rescale = load<T>(m.rescale + c);
        for (std::int64_t i = 0; i < d; ++i) {
          T* element = m.out + i * kQueryTile + c;
          store<T>(element, load<T>(element) * rescale);
        }
      }
    }
    weigh_rows<T>(x, h.v + key * h.ld, h.ld, d, m.s, m.out);
  }
  for (std::int64_t i = 0; i < tile.size(); ++i) lse[tile.begin + i] = m.peak[i] + vlog(m.sum[i]);
  for (std::int64_t i = 0; i < width; ++i) m.rescale[i] = T(1) / m.sum[i];
  transpose_out<T>(out + tile.begin * ld_out, ld_out, m.out, kQueryTile, tile.size(), d, m.rescale);
}

template <typename T>
struct BackwardScratch {
  BackwardScratch(void* memory, std::int64_t head_dim) {
    Parts parts(memory);
    query = parts.take<T>(head_dim * kQueryTile);
    dout = parts.take<T>(head_dim * kQueryTile);
    dquery = parts.take<T>(head_dim * kQueryTile);
    query_rows = parts.take<T>(padded<T>(head_dim) * kQueryTile);
    dout_rows = parts.take<T>(padded<T>(head_dim) * kQueryTile);
    p = parts.take<T>(kKeyTile * kQueryTile);
    ds = parts.take<T>(kKeyTile * kQueryTile);
    delta = parts.take<T>(kQueryTile);
    lse = parts.take<T>(kQueryTile);
    scale = parts.take<T>(kQueryTile);
  }
  static std::int64_t bytes(std::int64_t head_dim) {
    return 3 * part_bytes<T>(head_dim * kQueryTile) + 2 * part_bytes<T>(padded<T>(head_dim) * kQueryTile) +
           2 * part_bytes<T>(kKeyTile * kQueryTile) + 3 * part_bytes<T>(kQueryTile);
  }
  T *query, *dout, *dquery, *query_rows, *dout_rows, *p, *ds, *delta, *lse, *scale;
};

/// What the backward reads of a head, and where its gradients go: dq is overwritten. dk and dv are rows of
/// padded(d) for the keys [key_begin, key_end), and are added to (dk without the factor `scale`). Either may
/// be null: then it is not computed.
template <typename T>
struct BackwardRows {
  HeadRows<T> head;
  const T* dout;
  const T* out;
  std::int64_t ld_out;
  const T* lse;
  T* dq;
  T* dk;
  T* dv;
  std::int64_t key_begin;
  std::int64_t key_end;
  T scale;
};

/// P = exp(S - lse) into m.p and dS = P * (dP - delta) into m.ds, for vector c of queries.
template <typename T>
void softmax_backward(const Crossing<T>& x, std::int64_t c, const BackwardScratch<T>& m) {
  constexpr int W = kLanes<T>;
  using Index = typename LaneIndex<T>::type;
  const IndexVec<T> lanes = lane_numbers<T>();
  const std::int64_t seen = x.high(c);
  const std::int64_t seen_by_all = clamp(x.tile.begin + c * W - x.begin + 1, 0, seen);
  const Vec<T> lse = load<T>(m.lse + c * W);
  const Vec<T> delta = load<T>(m.delta + c * W);
  T work[W];
  for (std::int64_t j = 0; j < seen; ++j) {
    T* p_element = m.p + j * kQueryTile + c * W;
    T* ds_element = m.ds + j * kQueryTile + c * W;
    store<T>(work, load<T>(p_element) - lse);
    for (int l = 0; l < W; ++l) work[l] = vexp(work[l]);
    Vec<T> p = load<T>(work);
    Vec<T> ds = p * (load<T>(ds_element) - delta);
    if (j >= seen_by_all) {
      const IndexVec<T> sees = lanes >= static_cast<Index>(x.diagonal(c) + j);
      p = sees ? p : Vec<T>{};
      ds = sees ? ds : Vec<T>{};
    }
    store<T>(p_element, p);
    store<T>(ds_element, ds);
  }
}

/// Rows of d elements as rows of whole vectors: themselves, or a copy padded with zeros.
template <typename T>
const T* whole_vectors(const T* rows, std::int64_t& ld, std::int64_t n, std::int64_t d, T* copy) {
  const std::int64_t width = padded<T>(d);
  if (width == d) return rows;
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t e = 0; e < width; ++e) copy[i * width + e] = e < d ? rows[i * ld + e] : T(0);
  }
  ld = width;
  return copy;
}

template <typename T>
T dot(const T* a, const T* b, std::int64_t n) {
  constexpr int W = kLanes<T>;
  Vec<T> sums = {};
  std::int64_t i = 0;
  for (; i + W <= n; i += W) sums += load<T>(a + i) * load<T>(b + i);
  T sum = 0;
  for (int l = 0; l < W; ++l) sum += sums[l];
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <typename T>
void attend_backward(const QueryTile& tile, const BackwardRows<T>& r, const BackwardScratch<T>& m) {
  constexpr int W = kLanes<T>;
  const HeadRows<T>& h = r.head;
  const std::int64_t d = h.head_dim;
  const std::int64_t n = tile.size();
  const T* dout = r.dout + tile.begin * r.ld_out;
  const T* out = r.out + tile.begin * r.ld_out;
  transpose_in<T>(m.query, kQueryTile, h.q + tile.begin * h.ld, h.ld, n, d, r.scale);
  transpose_in<T>(m.dout, kQueryTile, dout, r.ld_out, n, d, T(1));
  for (std::int64_t i = 0; i < padded<T>(n); ++i) {
    m.delta[i] = i < n ? dot<T>(dout + i * r.ld_out, out + i * r.ld_out, d) : T(0);
    m.lse[i] = i < n ? r.lse[tile.begin + i] : T(0);
    m.scale[i] = r.scale;
  }
  std::int64_t ld_query = h.ld;
  std::int64_t ld_dout = r.ld_out;
  const T* query_rows = nullptr;
  const T* dout_rows = nullptr;
  if (r.dk != nullptr) {
    query_rows = whole_vectors<T>(h.q + tile.begin * h.ld, ld_query, n, d, m.query_rows);
    dout_rows = whole_vectors<T>(dout, ld_dout, n, d, m.dout_rows);
  }
  if (r.dq != nullptr) {
    for (std::int64_t i = 0; i < d * kQueryTile; ++i) m.dquery[i] = 0;
  }

  const std::int64_t ld_dkv = padded<T>(d);
  const std::int64_t end = smaller(tile.end, r.key_end);
  for (std::int64_t key = larger(tile.first, r.key_begin); key < end; key += kKeyTile) {
    const Crossing<T> x(tile, key, smaller(kKeyTile, end - key));
    scores<T>(x, h.k + key * h.ld, h.ld, d, m.query, m.p);
    scores<T>(x, h.v + key * h.ld, h.ld, d, m.dout, m.ds);
    for (std::int64_t c = 0; c < x.vectors; ++c) softmax_backward<T>(x, c, m);
    if (r.dq != nullptr) weigh_rows<T>(x, h.k + key * h.ld, h.ld, d, m.ds, m.dquery);
    if (r.dk != nullptr) {
      const std::int64_t at = (key - r.key_begin) * ld_dkv;
      gather_columns<T>(x, m.p, dout_rows, ld_dout, ld_dkv / W, r.dv + at, ld_dkv);
      gather_columns<T>(x, m.ds, query_rows, ld_query, ld_dkv / W, r.dk + at, ld_dkv);
    }
  }
  if (r.dq != nullptr) {
    transpose_out<T>(r.dq + tile.begin * h.ld, h.ld, m.dquery, kQueryTile, n, d, m.scale);
  }
}

}  // namespace fathom::cpu::FATHOM_ISA
