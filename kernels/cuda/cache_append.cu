// Keys and values of new rows to a pool of blocks: as numbers, or as codes (kernels/cache_codes.h). A warp
// has a head of a row; of numbers that lie in whole packs a thread has one.
#include "kernels/cuda/cached_attention.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/cache_codes.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/row_packs.cuh"

namespace fathom::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

template <typename T>
struct PacksToAppend {
  CachedRows<T> a;
  unsigned packs, kv_heads, all;
};

/// A warp a row and key/value head, of any size. Traffic: keys and values read and written once.
template <typename T>
__global__ void __launch_bounds__(kThreads) append_kernel(const CachedRows<T> a) {
  const CacheShape& s = a.s;
  const std::int64_t item = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const std::int64_t row = item / s.kv_heads, g = item % s.kv_heads, d = s.head_dim;
  if (row >= s.rows) return;
  const std::int64_t entry = a.lengths[row] - 1;
  T* const keys = a.pool + a.block_at(a.sequences[row], entry) + a.inside(g, entry);
  T* const values = keys + a.values_after_keys();
  const T* const k = a.qkv + row * (s.heads + 2 * s.kv_heads) * d + (s.heads + g) * d;
  const T* const v = k + s.kv_heads * d;
  for (std::int64_t e = threadIdx.x % 32; e < d; e += 32) {
    keys[e] = k[e];
    values[e] = v[e];
  }
}

constexpr int kPackThreads = 256;

/// A thread 16 bytes of a key and of its value, `packs` of which a head has: a row's length and its block's
/// number are the same for all of them, and come from the cache. Traffic: as above.
template <typename T>
__global__ void __launch_bounds__(kPackThreads) append_packs_kernel(const PacksToAppend<T> p) {
  const CachedRows<T>& a = p.a;
  const CacheShape& s = a.s;
  const unsigned i = blockIdx.x * kPackThreads + threadIdx.x;
  if (i >= p.all) return;
  const unsigned head = i / p.packs, row = head / p.kv_heads, g = head % p.kv_heads;
  const std::int64_t d = s.head_dim, element = (i % p.packs) * kPack<T>;
  const T* const k = a.qkv + row * (s.heads + 2 * s.kv_heads) * d + (s.heads + g) * d + element;
  const uint4 key = load_raw(k), value = load_raw(k + s.kv_heads * d);
  const std::int64_t entry = a.lengths[row] - 1;
  T* const keys = a.pool + a.block_at(a.sequences[row], entry) + a.inside(g, entry) + element;
  store_raw(keys, key);
  store_raw(keys + a.values_after_keys(), value);
}

/// False: heads that are no whole packs, or more than 32 bits count.
template <typename T>
bool append_packs(const char* op, const CachedRows<T>& a, cudaStream_t stream) {
  const CacheShape& s = a.s;
  const std::int64_t packs = s.head_dim / kPack<T>, all = s.rows * s.kv_heads * packs;
  if (s.head_dim % kPack<T> != 0 || !aligned(a.qkv) || !aligned(a.pool) || all > INT32_MAX) return false;
  launch(op, append_packs_kernel<T>, {blocks_for(all, kPackThreads), kPackThreads}, stream,
         PacksToAppend<T>{a, static_cast<unsigned>(packs), static_cast<unsigned>(s.kv_heads),
                          static_cast<unsigned>(all)});
  return true;
}

template <typename T>
struct CodesToAppend {
  CachedRows<T> a;
  const float* means;  // of keys, [kv_heads, d]; null: none
};

/// Of a row's head of keys, or with kv_heads added of its values.
template <typename T>
__device__ __forceinline__ HeadToCode<T> head_to_code(const T* x, const float* means, int head,
                                                      const CacheShape& s) {
  const bool has_mean = means != nullptr && head < s.kv_heads;
  return {x, has_mean ? means + head * s.head_dim : nullptr};
}

/// A warp a row and head of keys or values. Traffic: keys and values read, codes written once.
template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads) append_codes_kernel(const CodesToAppend<T> p) {
  const CachedRows<T>& a = p.a;
  const CacheShape& s = a.s;
  const std::int64_t item = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const std::int64_t row = item / (2 * s.kv_heads);
  const int head = static_cast<int>(item % (2 * s.kv_heads)), d = static_cast<int>(s.head_dim);
  if (row >= s.rows) return;
  const std::int64_t entry = a.lengths[row] - 1;
  const std::int64_t number = a.tables[a.sequences[row] * s.table + entry / s.block] * s.stride + s.offset;
  const auto block = CodeBlock<kBits>::at(a.codes, s, number);
  const int inside = static_cast<int>(entry % s.block);
  const T* const x = a.qkv + (row * (s.heads + 2 * s.kv_heads) + s.heads + head) * d;
  encode_head<kBits>(block.codes(head, inside), block.scales(head, inside), head_to_code(x, p.means, head, s),
                     d);
}

template <typename T>
struct RoundTrip {
  T* out;
  const T* qkv;
  const float* means;  // of keys, [kv_heads, d]; null: none
  CacheShape s;
};

/// A warp a row and head of any kind; queries are copied.
template <typename T, int kBits>
__global__ void __launch_bounds__(kThreads) round_trip_kernel(const RoundTrip<T> a) {
  const CacheShape& s = a.s;
  const std::int64_t item = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const std::int64_t heads = s.heads + 2 * s.kv_heads;
  const int d = static_cast<int>(s.head_dim), lane = static_cast<int>(threadIdx.x) % 32;
  if (item >= s.rows * heads) return;
  const T* const from = a.qkv + item * d;
  T* const to = a.out + item * d;
  const int head = static_cast<int>(item % heads - s.heads);
  if (head < 0) {
    for (int e = lane; e < d; e += 32) to[e] = from[e];
    return;
  }
  constexpr float kLevels = (1 << kBits) - 1;
  const HeadToCode<T> x = head_to_code(from, a.means, head, s);
  const CodeScale scale = code_scale(x, d, kBits);
  for (int e = lane; e < d; e += 32) to[e] = from_float<T>(scale.number(scale.code(x(e), kLevels)));
}

const float* means_of(const char* op, const CacheShape& s) {
  return optional_input<float>(op, "key_means", s.key_means, s.kv_heads * s.head_dim);
}

}  // namespace

void CudaBackend::cache_append(View pool, ConstView qkv, ConstView tables, ConstView sequences,
                               ConstView lengths, const CacheShape& s) {
  const char* op = "cache_append";
  for_compute_type(op, qkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    const CachedRows<T> a = cached_rows<T>(op, pool, qkv, tables, sequences, lengths, s);
    for_cache_bits(op, s.bits, [&](auto bits) {
      if constexpr (bits == 16) {
        if (append_packs(op, a, stream())) return;
        launch(op, append_kernel<T>, {blocks_for(s.rows * s.kv_heads, kWarps), kThreads, 0}, stream(), a);
      } else {
        launch(op, append_codes_kernel<T, bits>, {blocks_for(2 * s.rows * s.kv_heads, kWarps), kThreads, 0},
               stream(), CodesToAppend<T>{a, means_of(op, s)});
      }
    });
  });
}

void CudaBackend::cache_round_trip(View out, ConstView qkv, const CacheShape& s) {
  const char* op = "cache_round_trip";
  if (!is_cache_of_codes(s.bits)) fail(op, "bits", s.bits, 4);
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    const std::int64_t heads = s.rows * (s.heads + 2 * s.kv_heads);
    const RoundTrip<T> a{output<T>(op, "out", out, heads * s.head_dim),
                         input<T>(op, "qkv", qkv, heads * s.head_dim), means_of(op, s), s};
    const LaunchSize size{blocks_for(heads, kWarps), kThreads, 0};
    if (s.bits == 4) {
      launch(op, round_trip_kernel<T, 4>, size, stream(), a);
    } else {
      launch(op, round_trip_kernel<T, 8>, size, stream(), a);
    }
  });
}

}  // namespace fathom::cuda
