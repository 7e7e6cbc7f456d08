// How matrices of numbers are cut where warps of their own bring them (decode_feed.cuh), for up to eight rows
// x.
//
// Of each tile of eight rows (decode_product.cuh) a warp takes some columns, by units of 512 bytes, 16 of
// each lane: 64 columns of four of the tile's rows, a quad. These are whole lines of 128 bytes, since a load
// of eight halves of lines takes twice as long to come and to be written to shared memory.
//
// A unit is one operand of two of the tensor core's m16n8k16 (mma.cuh). Lane 4g+c has of the quad's row g / 2
// the columns 8c .. 8c+7 of the first 32 for even g, of the others for odd g. So the operand's eight columns
// are four rows twice. Rows x are there twice as well: row g of the other operand has of row g the first 32
// columns, row g + 8 the others. Of the result, lane 4g+c finds row g's sum with the quad's row c in two of
// its elements, and what the other two have is a product of columns that do not belong to each other.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/decode_product.cuh"

namespace fathom::cuda {

inline constexpr int kLineColumns = 64;

/// A matrix's shape, and what of it is this block's. `ring`: units that a warp's ring holds.
__device__ inline void deal_lines(Matrix& m, int rows, int width, int half, int ring) {
  m.deal(rows, width, half, ring);
  constexpr int kHalf = kDecodeWarps / 2;
  const int row_units = (width + kLineColumns - 1) / kLineColumns;
  const bool whole = width % kLineColumns == 0;
  const bool by_quads = whole && row_units % kDecodeWarps != 0 && row_units % kHalf == 0;
  m.parts = by_quads ? kHalf : kDecodeWarps;
  m.units = (row_units + m.parts - 1) / m.parts;
  m.at_once = 1;
  for (const int n : {3, 4, 8, 11}) {
    const int each = n % 2 == 0 ? n / 2 : n;  // an even number: of both quads
    if (whole && row_units % m.parts == 0 && m.units % each == 0 && ring >= 2 * n) m.at_once = n;
  }
  m.batches = (m.at_once % 2 == 0 ? 2 * m.units : m.units) / m.at_once;
  m.places = ring / m.at_once;
}
/// The number of a warp's part of the columns, and of its units there.
__device__ __forceinline__ int part_of_warp(const Matrix& m) {
  return static_cast<int>(threadIdx.x) / 32 & (m.parts - 1);
}
__device__ __forceinline__ int units_of_warp(const Matrix& m) {
  return max(0, min(m.units, (m.width + kLineColumns - 1) / kLineColumns - part_of_warp(m) * m.units));
}
/// Where each quad has its own warps: this one's.
__device__ __forceinline__ int quad_of_warp(const Matrix& m) {
  return m.parts < kDecodeWarps ? static_cast<int>(threadIdx.x) / 32 / (kDecodeWarps / 2) : 0;
}

/// Rows x in shared memory.
struct StagedLines {
  /// Words from a row to the next, so that eight rows' 16 bytes come without conflicts: 16 bytes beside a
  /// multiple of 32.
  static __host__ __device__ __forceinline__ int stride(int width) { return (width + 63) / 64 * 32 + 4; }
  static __host__ __device__ __forceinline__ int bytes(int width, int rows) {
    return stride(width) * rows * 4;
  }
  /// Where in a row the columns e .. e+7 begin, e a multiple of eight; each two of them are two words on.
  static __device__ __forceinline__ int place(int e) { return e / 64 * 32 + e % 32 / 8 * 8 + e % 64 / 32; }
  /// Two columns, e even.
  static __device__ __forceinline__ void put(std::uint32_t* staged, int stride, int row, int e,
                                             std::uint32_t word) {
    staged[row * stride + place(e / 8 * 8) + e % 8] = word;
  }
  /// Eight columns, e a multiple of eight.
  static __device__ __forceinline__ void put(std::uint32_t* staged, int stride, int row, int e, uint4 words) {
    std::uint32_t* const to = staged + row * stride + place(e);
    to[0] = words.x, to[2] = words.y, to[4] = words.z, to[6] = words.w;
  }
  /// Columns that a row's last unit has and the row has not: zeros. By `threads` threads.
  static __device__ __forceinline__ void pad(std::uint32_t* staged, int width, int rows, int thread,
                                             int threads) {
    if (width % kLineColumns == 0) return;
    for (int i = thread; i < rows * 16; i += threads)
      put(staged, stride(width), i / 16, width + i % 16 * 2, 0U);
  }
};

/// As a kernel has them.
template <int kHalves, bool kFed>
using StagedRows = std::conditional_t<kFed, StagedLines, Staged<kHalves>>;

}  // namespace fathom::cuda
