// Attention of new rows over keys and values in a pool of blocks: a warp a row and query head, in the order
// of attention_rows.cu, so that a row's result has the bits that it has without a cache and depends on no
// other row, nor on the size of the blocks.
#include "kernels/cuda/cached_attention.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/row_dot.cuh"
#include "kernels/cuda/device/row_runs.cuh"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

/// A warp a row and key/value head. Traffic: keys and values read and written once.
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

/// Traffic: q and out once; every query reads its keys and values.
template <typename T, int kParts>
__global__ void __launch_bounds__(kThreads) attend_kernel(const CachedRows<T> a) {
  __shared__ float vectors[kWarps][32 * kParts];
  const CacheShape& s = a.s;
  const std::int64_t item = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const std::int64_t row = item / s.heads, head = item % s.heads;
  if (row >= s.rows) return;
  const int d = static_cast<int>(s.head_dim), lane = static_cast<int>(threadIdx.x) % 32;
  const float scale = static_cast<float>(s.scale);
  const std::int64_t g = head / (s.heads / s.kv_heads), sequence = a.sequences[row], length = a.lengths[row];
  const T* const query = a.qkv + row * (s.heads + 2 * s.kv_heads) * d + head * d;
  float* const q = vectors[threadIdx.x / 32];
  for (int e = lane; e < d; e += 32) q[e] = to_float(query[e]);
  __syncwarp();

  float out[kParts] = {};
  float max = -INFINITY, sum = 0.0F;
  for (std::int64_t key = 0; key < length; key += 32) {
    const int count = static_cast<int>(min(length - key, static_cast<std::int64_t>(32)));
    const std::int64_t mine = lane < count ? key + lane : key;
    const T* const k = a.pool + a.block_at(sequence, mine) + a.inside(g, mine);
    const float score = lane < count ? dot(q, k, d) * scale : -INFINITY;
    const float most = fmaxf(max, warp_reduce(score, Max{}));
    const float p = expf(score - most), correction = expf(max - most);
    max = most;
    sum = sum * correction + warp_reduce(p, Sum{});
#pragma unroll
    for (int i = 0; i < kParts; ++i) out[i] *= correction;
    for (int j = 0; j < count; ++j) {
      const float w = __shfl_sync(kFullWarp, p, j);
      const T* const v =
          a.pool + a.block_at(sequence, key + j) + a.inside(g, key + j) + a.values_after_keys();
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const int e = lane + 32 * i;
        if (e < d) out[i] = fmaf(w, to_float(v[e]), out[i]);
      }
    }
  }
  T* const to = a.out + (row * s.heads + head) * d;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    if (lane + 32 * i < d) to[lane + 32 * i] = from_float<T>(out[i] * (1.0F / sum));
  }
}

template <typename T>
CachedRows<T> arguments(const char* op, View pool, ConstView qkv, ConstView tables, ConstView sequences,
                        ConstView lengths, const CacheShape& s) {
  if (s.kv_heads < 1 || s.heads % s.kv_heads != 0) fail(op, "heads modulo kv_heads", s.heads, s.kv_heads);
  if (s.block < 16 || s.block % 16 != 0) fail(op, "block", s.block, 16);
  return {output<T>(op, "pool", pool, s.blocks * s.block_elements()),
          nullptr,
          input<T>(op, "qkv", qkv, s.rows * (s.heads + 2 * s.kv_heads) * s.head_dim),
          input<std::int32_t>(op, "tables", tables, s.sequences * s.table),
          input<std::int32_t>(op, "sequences", sequences, s.rows),
          input<std::int32_t>(op, "lengths", lengths, s.rows),
          s};
}

template <typename T, int kParts>
void run(const CachedRows<T>& a, cudaStream_t stream) {
  launch("cached_attention", attend_kernel<T, kParts>,
         {blocks_for(a.s.rows * a.s.heads, kWarps), kThreads, 0}, stream, a);
}

// By the tensor cores: prompts by one kernel, rows that come alone by another, and whoever has rows for both
// has both kernels. False: heads that neither takes, or too few rows for the one that does. scratch(n):
// memory for n floats.
template <typename Scratch>
bool attend_fast(const CachedRows<bf16>& a, int multiprocessors, cudaStream_t stream, Scratch&& scratch) {
  const CacheShape& s = a.s;
  const bool by_flash = cached_flash_supports(s), by_split = cached_split_supports(s);
  if (!by_split) {
    if (!by_flash || s.rows < kManyRows * s.sequences) return false;
    attend_cached_flash(a, false, stream);
    return true;
  }
  const bool prompts = by_flash && s.rows >= s.sequences - 1 + kManyRows;  // one of them may have as many
  const bool alone = !prompts || s.sequences > 1;
  if (prompts) attend_cached_flash(a, alone, stream);
  if (!alone) return true;
  const int splits = cached_splits(s, multiprocessors);
  const auto floats = static_cast<std::int64_t>(cached_split_floats(s, splits));
  attend_cached_split(a, prompts, splits, floats > 0 ? scratch(floats) : nullptr, stream);
  return true;
}

}  // namespace

void CudaBackend::cache_append(View pool, ConstView qkv, ConstView tables, ConstView sequences,
                               ConstView lengths, const CacheShape& s) {
  const char* op = "cache_append";
  for_compute_type(op, pool.dtype, [&](auto zero) {
    using T = decltype(zero);
    const CachedRows<T> a = arguments<T>(op, pool, qkv, tables, sequences, lengths, s);
    launch(op, append_kernel<T>, {blocks_for(s.rows * s.kv_heads, kWarps), kThreads, 0}, stream(), a);
  });
}

void CudaBackend::cached_attention(View out, ConstView pool, ConstView qkv, ConstView tables,
                                   ConstView sequences, ConstView lengths, const CacheShape& s) {
  const char* op = "cached_attention";
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    const View read_only{const_cast<void*>(pool.data), pool.size, pool.dtype};
    CachedRows<T> a = arguments<T>(op, read_only, qkv, tables, sequences, lengths, s);
    a.out = output<T>(op, "out", out, s.rows * s.heads * s.head_dim);
    if constexpr (std::is_same_v<T, bf16>) {
      const auto scratch = [&](std::int64_t floats) { return scratch_of<float>(floats); };
      if (!options().invariant && attend_fast(a, multiprocessors(), stream(), scratch)) return;
    }
    if (s.head_dim <= 32) {
      run<T, 1>(a, stream());
    } else if (s.head_dim <= 64) {
      run<T, 2>(a, stream());
    } else if (s.head_dim <= 128) {
      run<T, 4>(a, stream());
    } else if (s.head_dim <= 256) {
      run<T, 8>(a, stream());
    } else {
      fail(op, "head_dim above what the kernels hold", s.head_dim, 256);
    }
  });
}

}  // namespace fathom::cuda
