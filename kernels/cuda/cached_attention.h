// Attention of new rows over keys and values in a pool of blocks (cached_attention of kernels/backend.h). A
// block holds keys and then values, each [kv_heads, block, head_dim].
//
// The row kernel (cached_attention.cu) takes any dtype and head size, and a row's result depends on its keys
// alone. The flash kernel (cached_attention_flash.cu) is for many bf16 rows of a sequence: prompts. The split
// kernel (cached_attention_split.cu) is for single bf16 rows of many or long ones: decoding.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

#include "kernels/backend.h"
#include "kernels/cuda/check.h"

namespace fathom::cuda {

template <typename T>
struct CachedRows {
  T* pool = nullptr;
  T* out = nullptr;
  const T* qkv = nullptr;
  const std::int32_t* tables = nullptr;
  const std::int32_t* sequences = nullptr;
  const std::int32_t* lengths = nullptr;
  CacheShape s;

#ifdef __CUDACC__
  /// Where the block of entry i of a sequence begins.
  __device__ __forceinline__ std::int64_t block_at(std::int64_t sequence, std::int64_t i) const {
    const std::int64_t block = tables[sequence * s.table + i / s.block];
    return (block * s.stride + s.offset) * 2 * s.kv_heads * s.block * s.head_dim;
  }
  /// Where head g of entry i lies within a block's keys, or within its values.
  __device__ __forceinline__ std::int64_t inside(std::int64_t g, std::int64_t i) const {
    return (g * s.block + i % s.block) * s.head_dim;
  }
  __device__ __forceinline__ std::int64_t values_after_keys() const {
    return s.kv_heads * s.block * s.head_dim;
  }
#endif
};

/// Heads that the flash kernel takes.
bool cached_flash_supports(const CacheShape& s);
/// `many`: only of sequences that have many rows in the pass (device/row_runs.cuh); others get zeros.
void attend_cached_flash(const CachedRows<bf16>& a, bool many, cudaStream_t stream);

/// Heads of 64 or 128, and groups of query heads, that the split kernel takes.
bool cached_split_supports(const CacheShape& s);
/// Into how many pieces it cuts the entries of each row, and the floats of scratch memory that it takes for
/// that.
int cached_splits(const CacheShape& s, int multiprocessors);
std::size_t cached_split_floats(const CacheShape& s, int splits);
/// `few`: only of sequences that do not; others stay as they are.
void attend_cached_split(const CachedRows<bf16>& a, bool few, int splits, float* scratch,
                         cudaStream_t stream);

}  // namespace fathom::cuda
