// Entries of a cache on their way into tiles of shared memory: keys and values of one head, as bf16.
#pragma once

#include <cstdint>

#include "kernels/cuda/cached_attention.h"
#include "kernels/cuda/device/cache_codes.cuh"
#include "kernels/cuda/device/code_words.cuh"
#include "kernels/cuda/device/flash_tile.cuh"

namespace fathom::cuda {

/// Keys and values of kKeys entries of a sequence from entry `first` on, a multiple of 16, head g: zeros
/// behind the last one. The entries that all threads copy at once lie in one block of the cache, which has
/// whole sixteens; so where it begins is looked up when one ends, and not for each entry.
template <int D, int kKeys, int kThreads>
__device__ __forceinline__ void copy_entries(const CachedRows<bf16>& a, bf16* stage, int sequence, int g,
                                             int first, int entries) {
  using Tile = SharedTile<D>;
  constexpr int kAtOnce = kThreads / Tile::kChunks;
  static_assert(16 % kAtOnce == 0);
  const CacheShape& s = a.s;
  const int block = static_cast<int>(s.block), d = static_cast<int>(s.head_dim);
  const std::int32_t* const table = a.tables + sequence * s.table;
  const Tile keys{stage}, values{stage + kKeys * D};
  const int c = static_cast<int>(threadIdx.x) % Tile::kChunks;
  const int own = static_cast<int>(threadIdx.x) / Tile::kChunks;
  const std::int64_t values_after = a.values_after_keys();
  int number = first / block, inside = first - number * block;
  const bf16* from = a.pool;
  const auto look_up = [&](int entry) {
    if (entry >= entries) return;
    from = a.pool + (table[number] * s.stride + s.offset) * 2 * s.kv_heads * s.block * d +
           (static_cast<std::int64_t>(g) * block + inside + own) * d + c * 8;
  };
  look_up(first);
#pragma unroll
  for (int i = 0; i < kKeys / kAtOnce; ++i) {
    const int row = i * kAtOnce + own;
    const bool valid = first + row < entries && c * 8 < d;
    copy_async(keys.chunk(row, c), from, valid);
    copy_async(values.chunk(row, c), from + values_after, valid);
    inside += kAtOnce;
    from += kAtOnce * d;
    if (inside < block) continue;
    inside = 0, ++number;
    look_up(first + (i + 1) * kAtOnce);
  }
  commit_copies();
}

/// Eight codes as 16 bytes of bf16.
template <int kBits>
__device__ __forceinline__ uint4 numbers_of(const std::uint32_t (&words)[kBits / 4], const CodeScale& scale) {
  const auto pair = [&](int e) {
    const auto code = [&](int i) {
      return words[i * kBits / 32] >> i * kBits % 32 & static_cast<unsigned>((1 << kBits) - 1);
    };
    return pack_bf16(scale.number(code(e)), scale.number(code(e + 1)));
  };
  return {pair(0), pair(2), pair(4), pair(6)};
}

/// The same entries from a cache of codes, by way of registers: asked for, and later put into the tile.
template <int D, int kBits, int kKeys, int kThreads>
class CodesOnTheWay {
 public:
  __device__ __forceinline__ void load(const CachedRows<bf16>& a, int sequence, int g, int first,
                                       int entries) {
    const CacheShape& s = a.s;
    const int size = static_cast<int>(s.block), d = static_cast<int>(s.head_dim);
    const std::int32_t* const table = a.tables + sequence * s.table;
    const int c = static_cast<int>(threadIdx.x) % Tile::kChunks;
    const int own = static_cast<int>(threadIdx.x) / Tile::kChunks;
    int number = first / size, inside = first - number * size;
    CodeBlock<kBits> block{};
    const auto look_up = [&](int entry) {
      if (entry < entries) block = CodeBlock<kBits>::at(a.codes, s, table[number] * s.stride + s.offset);
    };
    look_up(first);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool valid = first + i * kAtOnce + own < entries && c * 8 < d;
      key_scales_[i] = value_scales_[i] = 0;  // and so are all numbers
      if (valid) {
        const int other = block.kv_heads + g;
        load_words(keys_[i], block.codes(g, inside + own) + c * kBits);
        load_words(values_[i], block.codes(other, inside + own) + c * kBits);
        key_scales_[i] = *block.scales(g, inside + own);
        value_scales_[i] = *block.scales(other, inside + own);
      }
      inside += kAtOnce;
      if (inside < size) continue;
      inside = 0, ++number;
      look_up(first + (i + 1) * kAtOnce);
    }
  }
  __device__ __forceinline__ void store(bf16* stage) const {
    const Tile keys{stage}, values{stage + kKeys * D};
    const int c = static_cast<int>(threadIdx.x) % Tile::kChunks;
    const int own = static_cast<int>(threadIdx.x) / Tile::kChunks;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int row = i * kAtOnce + own;
      *reinterpret_cast<uint4*>(keys.chunk(row, c)) =
          numbers_of<kBits>(keys_[i], CodeScale::of(key_scales_[i]));
      *reinterpret_cast<uint4*>(values.chunk(row, c)) =
          numbers_of<kBits>(values_[i], CodeScale::of(value_scales_[i]));
    }
  }

 private:
  using Tile = SharedTile<D>;
  static constexpr int kAtOnce = kThreads / Tile::kChunks, kEach = kKeys / kAtOnce;
  static_assert(16 % kAtOnce == 0);

  std::uint32_t keys_[kEach][kBits / 4] = {}, values_[kEach][kBits / 4] = {};
  std::uint32_t key_scales_[kEach], value_scales_[kEach];
};

}  // namespace fathom::cuda
