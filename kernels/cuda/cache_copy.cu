// Entries of a pool of blocks to other places of it, and how well chunks of them suit a query. Right, and
// plain: both run once in many tokens, not at each.
#include "kernels/cuda/cached_attention.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/cache_codes.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace fathom::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

template <typename T>
struct Copying {
  T* pool;
  std::uint8_t* codes;
  const std::int32_t* from;
  const std::int32_t* to;
  std::int64_t entries;
  CacheShape s;
};

/// A warp an entry and head. Traffic: keys and values read and written once.
template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads) copy_kernel(const Copying<T> a) {
  const CacheShape& s = a.s;
  const std::int64_t item = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (item >= s.kv_heads * a.entries) return;
  const std::int64_t g = item / a.entries, from = a.from[item], to = a.to[item % a.entries];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if constexpr (kBits == 16) {
    const std::int64_t d = s.head_dim, block = 2 * s.kv_heads * s.block * d,
                       values = s.kv_heads * s.block * d;
    const T* const source = a.pool + from / s.block * block + (g * s.block + from % s.block) * d;
    T* const target = a.pool + to / s.block * block + (g * s.block + to % s.block) * d;
    for (std::int64_t e = lane; e < d; e += 32) {
      target[e] = source[e];
      target[values + e] = source[values + e];
    }
  } else {
    const auto source = CodeBlock<kBits>::at(a.codes, s, from / s.block);
    const auto target = CodeBlock<kBits>::at(a.codes, s, to / s.block);
    const int source_place = static_cast<int>(from % s.block), place = static_cast<int>(to % s.block);
    for (int part = 0; part < 2; ++part) {  // the key, then the value
      const int head = static_cast<int>(g + part * s.kv_heads);
      const std::uint8_t* const read = source.codes(head, source_place);
      std::uint8_t* const write = target.codes(head, place);
      for (int b = lane; b < source.bytes; b += 32) write[b] = read[b];
      if (lane == 0) *target.scales(head, place) = *source.scales(head, source_place);
    }
  }
}

template <typename T>
struct Scoring {
  float* scores;
  const T* query;
  std::int64_t chunks, chunk;
  CachedRows<T> cache;  // of it the pool, the table and the shape
};

/// A warp a chunk and key/value head, its lanes elements of the head. Traffic: keys read once.
template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads) scores_kernel(const Scoring<T> a) {
  const CacheShape& s = a.cache.s;
  const std::int64_t item = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (item >= s.kv_heads * a.chunks) return;
  const std::int64_t g = item / a.chunks, first = item % a.chunks * a.chunk;
  const int d = static_cast<int>(s.head_dim), lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t group = s.heads / s.kv_heads;
  float sum = 0.0F;
  for (int e = lane; e < d; e += 32) {
    float q = 0.0F;
    for (std::int64_t h = 0; h < group; ++h) q += to_float(a.query[(g * group + h) * d + e]);
    float keys = 0.0F;
    for (std::int64_t i = first; i < first + a.chunk; ++i) {
      if constexpr (kBits == 16) {
        keys += to_float(a.cache.pool[a.cache.block_at(0, i) + a.cache.inside(g, i) + e]);
      } else {
        const std::int64_t number = a.cache.tables[i / s.block] * s.stride + s.offset;
        const auto block = CodeBlock<kBits>::at(a.cache.codes, s, number);
        const int head = static_cast<int>(g), inside = static_cast<int>(i % s.block);
        keys +=
            CodeScale::of(*block.scales(head, inside)).number(code_at<kBits>(block.codes(head, inside), e));
      }
    }
    sum = fmaf(q, keys, sum);
  }
  sum = warp_reduce(sum, Sum{});
  if (lane == 0) a.scores[item] = sum / static_cast<float>(a.chunk);
}

}  // namespace

void CudaBackend::cache_copy(View pool, ConstView from, ConstView to, std::int64_t entries,
                             const CacheShape& s) {
  const char* op = "cache_copy";
  if (entries == 0) return;
  const std::int64_t size = s.blocks * s.block_elements();
  const auto* source = input<std::int32_t>(op, "from", from, s.kv_heads * entries);
  const auto* target = input<std::int32_t>(op, "to", to, entries);
  const LaunchSize grid{blocks_for(s.kv_heads * entries, kWarps), kThreads, 0};
  const auto copy = [&](auto zero, auto bits) {
    using T = decltype(zero);
    Copying<T> a{nullptr, nullptr, source, target, entries, s};
    if constexpr (bits == 16) {
      a.pool = output<T>(op, "pool", pool, size);
    } else {
      a.codes = output<std::uint8_t>(op, "pool", pool, size);
    }
    launch(op, copy_kernel<T, bits>, grid, stream(), a);
  };
  for_cache_bits(op, s.bits, [&](auto bits) {
    if constexpr (bits == 16) {
      for_compute_type(op, pool.dtype, [&](auto zero) { copy(zero, bits); });
    } else {
      copy(float{}, bits);
    }
  });
}

void CudaBackend::cache_chunk_scores(View scores, ConstView pool, ConstView query, ConstView table,
                                     std::int64_t chunks, std::int64_t chunk, const CacheShape& s) {
  const char* op = "cache_chunk_scores";
  if (s.kv_heads < 1 || s.heads % s.kv_heads != 0) fail(op, "heads modulo kv_heads", s.heads, s.kv_heads);
  if (chunk < 1 || chunks * chunk > s.table * s.block) fail(op, "chunks", chunks * chunk, s.table * s.block);
  if (chunks == 0) return;
  for_compute_type(op, query.dtype, [&](auto zero) {
    using T = decltype(zero);
    const std::int64_t size = s.blocks * s.block_elements();
    for_cache_bits(op, s.bits, [&](auto bits) {
      Scoring<T> a{output<float>(op, "scores", scores, s.kv_heads * chunks),
                   input<T>(op, "query", query, s.heads * s.head_dim),
                   chunks,
                   chunk,
                   {}};
      a.cache.s = s;
      a.cache.tables = input<std::int32_t>(op, "table", table, s.table);
      if constexpr (bits == 16) {
        a.cache.pool = const_cast<T*>(input<T>(op, "pool", pool, size));
      } else {
        a.cache.codes = const_cast<std::uint8_t*>(input<std::uint8_t>(op, "pool", pool, size));
      }
      launch(op, scores_kernel<T, bits>, {blocks_for(s.kv_heads * chunks, kWarps), kThreads, 0}, stream(), a);
    });
  });
}

}  // namespace fathom::cuda
