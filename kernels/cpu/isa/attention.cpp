// Attention over packed rows: which tiles there are, and which thread works on which. The arithmetic is in
// attention_tile.h.
#include "kernels/cpu/isa/attention_tile.h"
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/parallel.h"
#include "kernels/cpu/isa/tile_memory.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

/// The query tiles of all sequences: maximal runs of queries with the same first key, cut into kQueryTile.
class QueryTiles {
 public:
  QueryTiles(const char* op, const std::int32_t* first_key, const AttentionShape& s)
      : memory_(part_bytes<std::int64_t>(s.batch + 1) + part_bytes<QueryTile>(capacity(first_key, s))) {
    Parts parts(memory_.data());
    offsets_ = parts.take<std::int64_t>(s.batch + 1);
    tiles_ = parts.take<QueryTile>(0);
    std::int64_t count = 0;
    for (std::int64_t b = 0; b < s.batch; ++b) {
      offsets_[b] = count;
      const std::int32_t* first = first_key == nullptr ? nullptr : first_key + b * s.seq;
      for (std::int64_t begin = 0; begin < s.seq;) {
        const std::int64_t key = first == nullptr ? 0 : first[begin];
        if (key < 0 || key > begin) fail(op, "first_key of a query outside 0 .. its own index", key, begin);
        if (begin > 0 && first != nullptr && first[begin - 1] > key) {
          fail(op, "first_key decreases within a sequence", key, first[begin - 1]);
        }
        std::int64_t end = begin + 1;
        while (end < s.seq && end - begin < kQueryTile && (first == nullptr || first[end] == key)) ++end;
        tiles_[count++] = {begin, end, key};
        pairs_ += static_cast<double>(end - begin) *
                  (0.5 * static_cast<double>(begin + end) - static_cast<double>(key));
        begin = end;
      }
    }
    offsets_[s.batch] = count;
  }

  std::int64_t begin(std::int64_t b) const { return offsets_[b]; }
  std::int64_t end(std::int64_t b) const { return offsets_[b + 1]; }
  const QueryTile& operator[](std::int64_t i) const { return tiles_[i]; }
  /// (query, key) pairs of one head, the diagonal at half.
  double pairs() const { return pairs_; }

 private:
  static std::int64_t capacity(const std::int32_t* first_key, const AttentionShape& s) {
    const std::int64_t rows = s.batch * s.seq;
    if (first_key == nullptr) return s.batch * ((s.seq + kQueryTile - 1) / kQueryTile);
    std::int64_t runs = s.batch;
    for (std::int64_t i = 1; i < rows; ++i) runs += first_key[i] != first_key[i - 1];
    return rows / kQueryTile + runs;
  }

  TileMemory memory_;
  std::int64_t* offsets_ = nullptr;
  QueryTile* tiles_ = nullptr;
  double pairs_ = 0;
};

void check_shape(const char* op, const AttentionShape& s) {
  if (s.kv_heads < 1) fail(op, "kv_heads", s.kv_heads, 1);
  if (s.heads < 1) fail(op, "heads", s.heads, s.kv_heads);
  check_size(op, "heads modulo kv_heads", s.heads % s.kv_heads, 0);
  if (s.head_dim < 1) fail(op, "head_dim", s.head_dim, 1);
}
std::int64_t rows_of(const AttentionShape& s) { return s.batch * s.seq; }
std::int64_t qkv_size(const AttentionShape& s) {
  return rows_of(s) * (s.heads + 2 * s.kv_heads) * s.head_dim;
}
std::int64_t out_size(const AttentionShape& s) { return rows_of(s) * s.heads * s.head_dim; }

/// The packed rows of sequence b, query head h.
template <typename T>
HeadRows<T> head_rows(const T* qkv, const AttentionShape& s, std::int64_t b, std::int64_t h) {
  const std::int64_t ld = (s.heads + 2 * s.kv_heads) * s.head_dim;
  const T* sequence = qkv + b * s.seq * ld;
  const std::int64_t group = h / (s.heads / s.kv_heads);
  return {sequence + h * s.head_dim, sequence + (s.heads + group) * s.head_dim,
          sequence + (s.heads + s.kv_heads + group) * s.head_dim, ld, s.head_dim};
}

/// Calls body(item, memory) for items [0, n), cut into as many pieces as there are threads; each piece has
/// `bytes` of memory of its own.
template <typename Body>
void for_items(std::int64_t n, std::int64_t bytes, Body&& body) {
  if (n == 0) return;
  const std::int64_t grain = (n + threads() - 1) / threads();
  const TileMemory memory((n + grain - 1) / grain * bytes);
  parallel_for(n, grain, [&](std::int64_t begin, std::int64_t end) {
    char* own = static_cast<char*>(memory.data()) + begin / grain * bytes;
    for (std::int64_t i = begin; i < end; ++i) body(i, static_cast<void*>(own));
  });
}

/// Calls body(b, h, tile, memory) for each query tile of each head. Late tiles see more keys than early ones,
/// so an item is a tile from either end.
template <typename Body>
void for_query_tiles(const QueryTiles& tiles, const AttentionShape& s, std::int64_t bytes, Body&& body) {
  std::int64_t most = 0;
  for (std::int64_t b = 0; b < s.batch; ++b) most = larger(most, tiles.end(b) - tiles.begin(b));
  const std::int64_t pairs = (most + 1) / 2;
  for_items(s.batch * s.heads * pairs, bytes, [&](std::int64_t item, void* memory) {
    const std::int64_t b = item / (s.heads * pairs);
    const std::int64_t h = item / pairs % s.heads;
    const std::int64_t early = tiles.begin(b) + item % pairs;
    const std::int64_t late = tiles.end(b) - 1 - item % pairs;
    if (early <= late) body(b, h, tiles[early], memory);
    if (early < late) body(b, h, tiles[late], memory);
  });
}

template <typename T>
void forward(T* out, T* lse, const T* qkv, const QueryTiles& tiles, const AttentionShape& s) {
  const std::int64_t ld_out = s.heads * s.head_dim;
  for_query_tiles(tiles, s, ForwardScratch<T>::bytes(s.head_dim),
                  [&](std::int64_t b, std::int64_t h, const QueryTile& tile, void* memory) {
                    attend_forward<T>(tile, head_rows<T>(qkv, s, b, h), static_cast<T>(s.scale),
                                      out + b * s.seq * ld_out + h * s.head_dim, ld_out,
                                      lse + (b * s.heads + h) * s.seq, ForwardScratch<T>(memory, s.head_dim));
                  });
}

template <typename T>
struct Backward {
  T* dqkv;
  const T* dout;
  const T* out;
  const T* lse;
  const T* qkv;
  const QueryTiles& tiles;
  const AttentionShape& s;

  std::int64_t group_size() const { return s.heads / s.kv_heads; }

  BackwardRows<T> rows(std::int64_t b, std::int64_t h) const {
    const std::int64_t ld_out = s.heads * s.head_dim;
    const std::int64_t at = b * s.seq * ld_out + h * s.head_dim;
    BackwardRows<T> r{};
    r.head = head_rows<T>(qkv, s, b, h);
    r.dout = dout + at;
    r.out = out + at;
    r.ld_out = ld_out;
    r.lse = lse + (b * s.heads + h) * s.seq;
    r.key_end = s.seq;
    r.scale = static_cast<T>(s.scale);
    return r;
  }
  T* dq_rows(std::int64_t b, std::int64_t h) const { return dqkv + (head_rows<T>(qkv, s, b, h).q - qkv); }

  static std::int64_t dkv_bytes(std::int64_t keys, std::int64_t d) {
    return 2 * part_bytes<T>(keys * padded<T>(d));
  }

  /// dK and dV of the keys [begin, end) of a key/value head, and dQ of its query heads on the way when asked.
  enum class Queries { WithGradient, Without };
  void key_range(std::int64_t b, std::int64_t g, std::int64_t begin, std::int64_t end, Queries queries,
                 void* memory) const {
    const std::int64_t d = s.head_dim;
    const std::int64_t width = padded<T>(d);
    const BackwardScratch<T> scratch(memory, d);
    Parts parts(static_cast<char*>(memory) + BackwardScratch<T>::bytes(d));
    T* dk = parts.take<T>((end - begin) * width);
    T* dv = parts.take<T>((end - begin) * width);
    for (std::int64_t i = 0; i < (end - begin) * width; ++i) dk[i] = dv[i] = 0;
    for (std::int64_t h = g * group_size(); h < (g + 1) * group_size(); ++h) {
      BackwardRows<T> r = rows(b, h);
      r.dk = dk;
      r.dv = dv;
      r.key_begin = begin;
      r.key_end = end;
      if (queries == Queries::WithGradient) r.dq = dq_rows(b, h);
      for (std::int64_t t = tiles.begin(b); t < tiles.end(b); ++t) {
        if (tiles[t].first < end && tiles[t].end > begin) attend_backward<T>(tiles[t], r, scratch);
      }
    }
    const HeadRows<T> head = head_rows<T>(qkv, s, b, g * group_size());
    T* dk_rows = dqkv + (head.k - qkv);
    T* dv_rows = dqkv + (head.v - qkv);
    for (std::int64_t j = begin; j < end; ++j) {
      for (std::int64_t e = 0; e < d; ++e) {
        dk_rows[j * head.ld + e] = dk[(j - begin) * width + e] * static_cast<T>(s.scale);
        dv_rows[j * head.ld + e] = dv[(j - begin) * width + e];
      }
    }
  }

  /// One item a key/value head: dK and dV need no other thread's part, and nothing is computed twice.
  void by_head() const {
    const std::int64_t bytes = BackwardScratch<T>::bytes(s.head_dim) + dkv_bytes(s.seq, s.head_dim);
    for_items(s.batch * s.kv_heads, bytes, [&](std::int64_t item, void* memory) {
      key_range(item / s.kv_heads, item % s.kv_heads, 0, s.seq, Queries::WithGradient, memory);
    });
  }

  /// Few heads: dQ by query tiles, then dK and dV by key tiles. The probabilities are computed twice, but the
  /// items are many. Every sum has the order of by_head, so the bits are the same.
  void by_tile() const {
    for_query_tiles(tiles, s, BackwardScratch<T>::bytes(s.head_dim),
                    [&](std::int64_t b, std::int64_t h, const QueryTile& tile, void* memory) {
                      BackwardRows<T> r = rows(b, h);
                      r.dq = dq_rows(b, h);
                      attend_backward<T>(tile, r, BackwardScratch<T>(memory, s.head_dim));
                    });
    const std::int64_t key_tiles = (s.seq + kKeyTile - 1) / kKeyTile;
    const std::int64_t pairs = (key_tiles + 1) / 2;
    const std::int64_t bytes = BackwardScratch<T>::bytes(s.head_dim) + dkv_bytes(kKeyTile, s.head_dim);
    for_items(s.batch * s.kv_heads * pairs, bytes, [&](std::int64_t item, void* memory) {
      const std::int64_t b = item / pairs / s.kv_heads;
      const std::int64_t g = item / pairs % s.kv_heads;
      const std::int64_t early = item % pairs;
      const std::int64_t late = key_tiles - 1 - early;
      key_range(b, g, early * kKeyTile, smaller((early + 1) * kKeyTile, s.seq), Queries::Without, memory);
      if (early < late)
        key_range(b, g, late * kKeyTile, smaller((late + 1) * kKeyTile, s.seq), Queries::Without, memory);
    });
  }

  void run() const {
    // by_head does 5 products a tile, by_tile 7 spread evenly; by_head's last round may leave threads idle.
    const std::int64_t items = s.batch * s.kv_heads;
    const std::int64_t rounds = (items + threads() - 1) / threads();
    if (5 * rounds * threads() <= 7 * items) {
      by_head();
    } else {
      by_tile();
    }
  }
};

}  // namespace

void CpuBackend::attention_forward(View out, View lse, ConstView qkv, ConstView first_key,
                                   const AttentionShape& s) {
  const char* op = "attention_forward";
  check_shape(op, s);
  for_compute_type(op, qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* outs = output<T>(op, "out", out, out_size(s));
    T* sums = output<T>(op, "lse", lse, rows_of(s) * s.heads);
    const T* rows = input<T>(op, "qkv", qkv, qkv_size(s));
    const QueryTiles tiles(op, optional_input<std::int32_t>(op, "first_key", first_key, rows_of(s)), s);
    flop_log.add("attention_scores", 4.0 * static_cast<double>(s.heads * s.head_dim) * tiles.pairs());
    forward<T>(outs, sums, rows, tiles, s);
  });
}

void CpuBackend::attention_backward(View dqkv, ConstView dout, ConstView out, ConstView lse, ConstView qkv,
                                    ConstView first_key, const AttentionShape& s) {
  const char* op = "attention_backward";
  check_shape(op, s);
  for_compute_type(op, qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* gradient = output<T>(op, "dqkv", dqkv, qkv_size(s));
    const T* douts = input<T>(op, "dout", dout, out_size(s));
    const T* outs = input<T>(op, "out", out, out_size(s));
    const T* sums = input<T>(op, "lse", lse, rows_of(s) * s.heads);
    const T* rows = input<T>(op, "qkv", qkv, qkv_size(s));
    const QueryTiles tiles(op, optional_input<std::int32_t>(op, "first_key", first_key, rows_of(s)), s);
    flop_log.add("attention_scores", 8.0 * static_cast<double>(s.heads * s.head_dim) * tiles.pairs());
    Backward<T>{gradient, douts, outs, sums, rows, tiles, s}.run();
  });
}

void CpuBackend::first_keys(View first_key, ConstView documents, std::int64_t batch, std::int64_t seq) {
  const char* op = "first_keys";
  auto* first = output<std::int32_t>(op, "first_key", first_key, batch * seq);
  const auto* document = input<std::int32_t>(op, "documents", documents, batch * seq);
  for (std::int64_t b = 0; b < batch; ++b) {
    for (std::int64_t t = 0; t < seq; ++t) {
      const std::int64_t i = b * seq + t;
      first[i] = t > 0 && document[i] == document[i - 1] ? first[i - 1] : static_cast<std::int32_t>(t);
    }
  }
}

}  // namespace fathom::cpu::FATHOM_ISA
