// Attention of new rows over keys and values in a pool of blocks (cached_attention of kernels/backend.h). A
// block holds keys and then values, each [kv_heads, block, head_dim], or their codes (kernels/cache_codes.h).
//
// The row kernel (cached_attention.cu) takes any dtype and head size, and a row's result depends on its keys
// alone. The flash kernel (cached_attention_flash.cu) is for many bf16 rows of a sequence: prompts. The split
// kernel (cached_attention_split.cu) is for single bf16 rows of many or long ones: decoding. The few-row
// kernel (cached_attention_few.cu) is for some bf16 rows of one sequence, which may be long: what speculative
// decoding checks. All read codes in registers: the split kernel as they are (device/code_walk.cuh), the
// others as the numbers of the compute dtype that they stand for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

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
  std::uint8_t* codes = nullptr;  // the pool, where it has codes

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

/// Calls body(std::integral_constant<int, bits>) with the bits of a cache: 16, 8 or 4.
template <typename Body>
void for_cache_bits(const char* op, int bits, Body&& body) {
  if (bits == 16) {
    body(std::integral_constant<int, 16>{});
  } else if (bits == 8) {
    body(std::integral_constant<int, 8>{});
  } else if (bits == 4) {
    body(std::integral_constant<int, 4>{});
  } else {
    fail(op, "bits", bits, 4);
  }
}

/// Checked, without an output.
template <typename T>
CachedRows<T> cached_rows(const char* op, View pool, ConstView qkv, ConstView tables, ConstView sequences,
                          ConstView lengths, const CacheShape& s) {
  if (s.kv_heads < 1 || s.heads % s.kv_heads != 0) fail(op, "heads modulo kv_heads", s.heads, s.kv_heads);
  if (s.block < 16 || s.block % 16 != 0) fail(op, "block", s.block, 16);
  const std::int64_t size = s.blocks * s.block_elements();
  CachedRows<T> a;
  if (s.bits < 16) {
    a.codes = output<std::uint8_t>(op, "pool", pool, size);
  } else {
    a.pool = output<T>(op, "pool", pool, size);
  }
  a.qkv = input<T>(op, "qkv", qkv, s.rows * (s.heads + 2 * s.kv_heads) * s.head_dim);
  a.tables = input<std::int32_t>(op, "tables", tables, s.sequences * s.table);
  a.sequences = input<std::int32_t>(op, "sequences", sequences, s.rows);
  a.lengths = input<std::int32_t>(op, "lengths", lengths, s.rows);
  a.s = s;
  return a;
}

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

/// Whether it is to be used: not with FATHOM_FEW_ROWS=0 in the environment, to measure what it brings.
bool cached_few_wanted();
/// Whether the few-row kernel takes these rows: one sequence's, of heads of 64 or 128.
bool cached_few_supports(const CacheShape& s);
/// Likewise, as of the split kernel.
int cached_few_splits(const CacheShape& s, int multiprocessors);
std::size_t cached_few_floats(const CacheShape& s, int splits);
void attend_cached_few(const CachedRows<bf16>& a, int splits, float* scratch, cudaStream_t stream);

}  // namespace fathom::cuda
