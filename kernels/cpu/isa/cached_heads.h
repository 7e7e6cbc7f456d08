// One key/value head of one sequence, in the blocks of a cache: of numbers, or of codes.
//
// Both have for_keys(key, count, tile, body) and for_values(key, count, tile, body): the entries [key, key +
// count) of a tile of attention. body gets them part by part, as pointer p, stride and the part's place [at,
// at + n) in the tile: element (e, i) of the keys is p[e * stride + i], element (i, e) of the values p[i *
// head_dim + e]. Past n up to whole vectors the keys are what memory gives. `tile`: tile_elements() of room.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/isa/attention_tile.h"
#include "kernels/cpu/isa/cache_codes.h"

namespace fathom::cpu::FATHOM_ISA {

/// Numbers: a block has of each head the keys as [head_dim, block], then of each the values as [block,
/// head_dim].
template <typename T>
struct CachedNumbers {
  const T* pool;
  const std::int32_t* table;
  const CacheShape& s;
  std::int64_t group;

  static std::int64_t tile_elements(const CacheShape&) { return 0; }

  const T* keys(std::int64_t block) const {
    return pool + s.block_of(table[block]) * s.block_elements() + group * s.head_dim * s.block;
  }
  const T* values(std::int64_t block) const { return keys(block) + s.kv_heads * s.head_dim * s.block; }

  template <typename Body>
  void for_keys(std::int64_t key, std::int64_t count, T*, Body&& body) const {
    for_blocks(key, count, [&](std::int64_t block, std::int64_t inside, std::int64_t at, std::int64_t n) {
      body(keys(block) + inside, s.block, at, n);
    });
  }
  template <typename Body>
  void for_values(std::int64_t key, std::int64_t count, T*, Body&& body) const {
    for_blocks(key, count, [&](std::int64_t block, std::int64_t inside, std::int64_t at, std::int64_t n) {
      body(values(block) + inside * s.head_dim, s.head_dim, at, n);
    });
  }

 private:
  template <typename Body>
  void for_blocks(std::int64_t key, std::int64_t count, Body&& body) const {
    for (std::int64_t at = 0; at < count;) {
      const std::int64_t block = (key + at) / s.block, inside = (key + at) % s.block;
      const std::int64_t n = smaller(s.block - inside, count - at);
      body(block, inside, at, n);
      at += n;
    }
  }
};

/// Codes (kernels/cache_codes.h): a tile becomes numbers, which all query heads of the group then read from
/// the nearest cache.
template <typename T, int kBits>
struct CachedCodes {
  const std::uint8_t* pool;
  const std::int32_t* table;
  const CacheShape& s;
  std::int64_t group;

  static_assert(kBits == 4 || kBits == 8);
  static std::int64_t tile_elements(const CacheShape& s) { return kKeyTile * (s.head_dim + s.head_dim % 2); }

  template <typename Body>
  void for_keys(std::int64_t key, std::int64_t count, T* tile, Body&& body) const {
    for (std::int64_t at = 0; at < count;) {
      const Part p = part(key, count, at);
      // Whole vectors, which lie in the same block.
      decode_keys(tile + at, p.codes + p.inside, p.scales + p.inside, (p.n + 15) / 16 * 16);
      at += p.n;
    }
    body(static_cast<const T*>(tile), kKeyTile, 0, count);
  }
  template <typename Body>
  void for_values(std::int64_t key, std::int64_t count, T* tile, Body&& body) const {
    for (std::int64_t at = 0; at < count;) {
      const Part p = part(key, count, at);
      decode_values(tile + at * s.head_dim, p.codes + s.kv_heads * s.block * row() + p.inside * row(),
                    p.scales + s.kv_heads * s.block + p.inside, p.n);
      at += p.n;
    }
    body(static_cast<const T*>(tile), s.head_dim, 0, count);
  }

 private:
  struct Part {
    const std::uint8_t* codes;    // of the head's keys in the block
    const std::uint32_t* scales;  // likewise
    std::int64_t inside, n;
  };
  std::int64_t row() const { return cache_code_bytes(s.head_dim, kBits); }
  Part part(std::int64_t key, std::int64_t count, std::int64_t at) const {
    const std::int64_t block = (key + at) / s.block, inside = (key + at) % s.block;
    const std::uint8_t* from = pool + s.block_of(table[block]) * s.block_elements();
    const auto* scales = reinterpret_cast<const std::uint32_t*>(from + 2 * s.kv_heads * s.block * row());
    return {from + group * s.block * row(), scales + group * s.block, inside,
            smaller(s.block - inside, count - at)};
  }

  // n: a multiple of 16
  void decode_keys(T* __restrict to, const std::uint8_t* __restrict codes,
                   const std::uint32_t* __restrict scales, std::int64_t n) const {
    constexpr int W = kCodeLanes<T>;
    for (std::int64_t i = 0; i < n; i += W) {
      const ScaleVec<T> scale(scales + i);
      for (std::int64_t r = 0; r < row(); ++r) {
        const CodeVec<T> c = load_codes<T>(codes + r * s.block + i);
        T* x = to + (kBits == 4 ? 2 * r : r) * kKeyTile + i;
        if constexpr (kBits == 4) {
          store<T>(x, scale.numbers(c & 15));
          store<T>(x + kKeyTile, scale.numbers(c >> 4));
        } else {
          store<T>(x, scale.numbers(c));
        }
      }
    }
  }
  void decode_values(T* __restrict to, const std::uint8_t* __restrict codes,
                     const std::uint32_t* __restrict scales, std::int64_t n) const {
    constexpr int W = kCodeLanes<T>;
    const std::int64_t d = s.head_dim, first = kBits == 4 ? row() : d;
    const std::int64_t whole = (d - (kBits == 4 ? first : 0)) / W * W;  // of both halves, in vectors
    for (std::int64_t i = 0; i < n; ++i) {
      const CodeScale scale = scale_of(scales[i]);
      const ScaleVec<T> wide(scale);
      const std::uint8_t* c = codes + i * row();
      T* x = to + i * d;
      for (std::int64_t e = 0; e < whole; e += W) {
        const CodeVec<T> of = load_codes<T>(c + e);
        if constexpr (kBits == 4) {
          store<T>(x + e, wide.numbers(of & 15));
          store<T>(x + first + e, wide.numbers(of >> 4));
        } else {
          store<T>(x + e, wide.numbers(of));
        }
      }
      for (std::int64_t e = whole; e < first; ++e) {
        const int code = kBits == 4 ? c[e] & 15 : c[e];
        x[e] = static_cast<T>(scale.low + scale.step * static_cast<float>(code));
      }
      for (std::int64_t e = first + whole; e < d; ++e)
        x[e] = static_cast<T>(scale.low + scale.step * static_cast<float>(c[e - first] >> 4));
    }
  }
};

}  // namespace fathom::cpu::FATHOM_ISA
