// Attention of new rows over keys and values in a pool of blocks: a warp a row and query head, in the order
// of attention_rows.cu, so that a row's result has the bits that it has without a cache and depends on no
// other row, nor on the size of the blocks.
#include "kernels/cuda/cached_attention.h"
#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/cache_codes.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/row_dot.cuh"
#include "kernels/cuda/device/row_runs.cuh"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

/// A head of one entry, as the row kernel reads it.
template <typename T, int kBits>
struct EntryHead {
  const std::uint8_t* codes;
  CodeScale scale;

  __device__ __forceinline__ EntryHead(const CachedRows<T>& a, std::int64_t sequence, std::int64_t head,
                                       std::int64_t entry) {
    const CacheShape& s = a.s;
    const std::int64_t number = a.tables[sequence * s.table + entry / s.block] * s.stride + s.offset;
    const auto block = CodeBlock<kBits>::at(a.codes, s, number);
    const int inside = static_cast<int>(entry % s.block);
    codes = block.codes(static_cast<int>(head), inside);
    scale = CodeScale::of(*block.scales(static_cast<int>(head), inside));
  }
  __device__ __forceinline__ float operator[](int e) const {
    return to_float(from_float<T>(scale.number(code_at<kBits>(codes, e))));
  }
  /// In the order of row_dot.cuh.
  __device__ __forceinline__ float dot_with(const float* x, int n) const {
    float sum = 0.0F;
#pragma unroll 4
    for (int e = 0; e < n; ++e) sum = fmaf(x[e], (*this)[e], sum);
    return sum;
  }
};
template <typename T>
struct EntryHead<T, 16> {
  const T* data;

  /// head: of the keys, or with kv_heads added of the values.
  __device__ __forceinline__ EntryHead(const CachedRows<T>& a, std::int64_t sequence, std::int64_t head,
                                       std::int64_t entry)
      : data(a.pool + a.block_at(sequence, entry) + a.inside(head, entry)) {}
  __device__ __forceinline__ float operator[](int e) const { return to_float(data[e]); }
  __device__ __forceinline__ float dot_with(const float* x, int n) const { return dot(x, data, n); }
};

/// Traffic: q and out once; every query reads its keys and values.
template <typename T, int kParts, int kBits>
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
    const EntryHead<T, kBits> k(a, sequence, g, mine);
    const float score = lane < count ? k.dot_with(q, d) * scale : -INFINITY;
    const float most = fmaxf(max, warp_reduce(score, Max{}));
    const float p = expf(score - most), correction = expf(max - most);
    max = most;
    sum = sum * correction + warp_reduce(p, Sum{});
#pragma unroll
    for (int i = 0; i < kParts; ++i) out[i] *= correction;
    for (int j = 0; j < count; ++j) {
      const float w = __shfl_sync(kFullWarp, p, j);
      const EntryHead<T, kBits> v(a, sequence, s.kv_heads + g, key + j);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const int e = lane + 32 * i;
        if (e < d) out[i] = fmaf(w, v[e], out[i]);
      }
    }
  }
  T* const to = a.out + (row * s.heads + head) * d;
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    if (lane + 32 * i < d) to[lane + 32 * i] = from_float<T>(out[i] * (1.0F / sum));
  }
}

template <typename T, int kParts>
void run(const CachedRows<T>& a, cudaStream_t stream) {
  const char* op = "cached_attention";
  for_cache_bits(op, a.s.bits, [&](auto bits) {
    launch(op, attend_kernel<T, kParts, bits>, {blocks_for(a.s.rows * a.s.heads, kWarps), kThreads, 0},
           stream, a);
  });
}

// By the tensor cores: some rows of one sequence by one kernel, prompts by another, rows that come alone by a
// third, and whoever has rows for these two has both. False: heads that neither takes, or too few rows for
// the one that does. scratch(n): memory for n floats.
template <typename Scratch>
bool attend_fast(const CachedRows<bf16>& a, int multiprocessors, cudaStream_t stream, Scratch&& scratch) {
  const CacheShape& s = a.s;
  if (cached_few_wanted() && cached_few_supports(s)) {
    const int splits = cached_few_splits(s, multiprocessors);
    const auto floats = static_cast<std::int64_t>(cached_few_floats(s, splits));
    attend_cached_few(a, splits, floats > 0 ? scratch(floats) : nullptr, stream);
    return true;
  }
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

void CudaBackend::cached_attention(View out, ConstView pool, ConstView qkv, ConstView tables,
                                   ConstView sequences, ConstView lengths, const CacheShape& s) {
  const char* op = "cached_attention";
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    const View read_only{const_cast<void*>(pool.data), pool.size, pool.dtype};
    CachedRows<T> a = cached_rows<T>(op, read_only, qkv, tables, sequences, lengths, s);
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
