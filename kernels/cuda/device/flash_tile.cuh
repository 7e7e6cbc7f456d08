// Tiles of bf16 rows in shared memory, and the fragments of mma that are read from them and written to global
// memory.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/reduce.cuh"

namespace fathom::cuda {

/// exp(x) = exp2(x * kLog2E), which the hardware has.
inline constexpr float kLog2E = 1.4426950408889634F;

/// Rows of D elements. The 16-byte chunks of a row are permuted by the row's number, so that a chunk of eight
/// consecutive rows lies in different banks.
template <int D>
struct SharedTile {
  static_assert(D % 64 == 0);
  static constexpr int kChunks = D / 8;

  __nv_bfloat16* data;

  __device__ __forceinline__ __nv_bfloat16* chunk(int row, int c) const {
    return data + row * D + ((c ^ (row & 7)) << 3);
  }
  /// The tile that begins `rows` (a multiple of 8) further down.
  __device__ __forceinline__ SharedTile from_row(int rows) const { return {data + rows * D}; }
};

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % 32; }

/// A[16, 16] stored as rows of A: rows row .. row+15, columns 8 * chunk .. +15.
template <int D>
__device__ __forceinline__ void load_a(std::uint32_t (&a)[4], SharedTile<D> tile, int row, int chunk) {
  const int lane = lane_id();
  load_matrices(a, tile.chunk(row + lane % 16, chunk + lane / 16));
}
/// A[16, 16] stored as its transpose: rows row .. row+15 are A's columns, columns 8 * chunk .. +15 A's rows.
template <int D>
__device__ __forceinline__ void load_a_transposed(std::uint32_t (&a)[4], SharedTile<D> tile, int row,
                                                  int chunk) {
  const int lane = lane_id();
  load_matrices_transposed(a, tile.chunk(row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
}
/// Two tiles B[16, 8] stored as their transposes (as keys are, for q k^T): b[0], b[1] of the columns that are
/// rows row .. row+7, b[2], b[3] of row+8 .. row+15; B's rows are the columns 8 * chunk .. +15.
template <int D>
__device__ __forceinline__ void load_b(std::uint32_t (&b)[4], SharedTile<D> tile, int row, int chunk) {
  const int lane = lane_id();
  load_matrices(b, tile.chunk(row + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
}
/// Two tiles B[16, 8] stored as rows of B (as values are, for p v): rows row .. row+15; b[0], b[1] of the
/// columns 8 * chunk .. +7, b[2], b[3] of the next eight.
template <int D>
__device__ __forceinline__ void load_b_rows(std::uint32_t (&b)[4], SharedTile<D> tile, int row, int chunk) {
  const int lane = lane_id();
  load_matrices_transposed(b, tile.chunk(row + lane % 16, chunk + lane / 16));
}

/// One head's rows of a sequence in global memory.
struct HeadRows {
  const __nv_bfloat16* data;
  std::int64_t stride;  // elements from a row to the next
  int rows;             // of the sequence
  int head_dim;         // a multiple of 8
};

/// Starts the copy of kRows rows from `row` on into the tile: zeros beyond the sequence and beyond the head.
template <int D, int kRows, int kThreads>
__device__ __forceinline__ void copy_rows(SharedTile<D> tile, const HeadRows& from, int row) {
  constexpr int kChunks = SharedTile<D>::kChunks;
  static_assert(kRows * kChunks % kThreads == 0);
#pragma unroll
  for (int i = 0; i < kRows * kChunks / kThreads; ++i) {
    const int at = static_cast<int>(threadIdx.x) + i * kThreads;
    const int r = at / kChunks, c = at % kChunks;
    const bool valid = row + r < from.rows && c * 8 < from.head_dim;
    copy_async(tile.chunk(r, c), valid ? from.data + (row + r) * from.stride + c * 8 : from.data, valid);
  }
}

/// Transposes a 4 x 4 matrix of words over the four lanes that share g: lane c's r[j] becomes lane j's r[c].
__device__ __forceinline__ void transpose_quad(std::uint32_t (&r)[4]) {
  const bool odd = lane_id() % 2 != 0, high = lane_id() / 2 % 2 != 0;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const std::uint32_t other = __shfl_xor_sync(kFullWarp, odd ? r[i] : r[i + 1], 1);
    if (odd) {
      r[i] = other;
    } else {
      r[i + 1] = other;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t other = __shfl_xor_sync(kFullWarp, high ? r[i] : r[i + 2], 2);
    if (high) {
      r[i] = other;
    } else {
      r[i + 2] = other;
    }
  }
}

/// The A fragments of 16 rows from `row` on, straight from global memory, 16 bytes a lane. row_at(r): where
/// row r begins; null: it is zeros.
template <int D, typename RowAt>
__device__ __forceinline__ void load_a_rows_at(std::uint32_t (&a)[D / 16][4], const RowAt& row_at,
                                               int head_dim, int row) {
  const int g = lane_id() / 4, c = lane_id() % 4;
  uint4 raw[2][D / 32];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const __nv_bfloat16* const from = row_at(row + g + 8 * half);
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      const int column = 32 * j + 8 * c;
      raw[half][j] = make_uint4(0, 0, 0, 0);
      if (from != nullptr && column < head_dim) {
        raw[half][j] = *reinterpret_cast<const uint4*>(from + column);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      std::uint32_t r[4] = {raw[half][j].x, raw[half][j].y, raw[half][j].z, raw[half][j].w};
      transpose_quad(r);
      a[2 * j][half] = r[0];
      a[2 * j][half + 2] = r[1];
      a[2 * j + 1][half] = r[2];
      a[2 * j + 1][half + 2] = r[3];
    }
  }
}

template <int D>
__device__ __forceinline__ void load_a_rows(std::uint32_t (&a)[D / 16][4], const HeadRows& from, int row) {
  load_a_rows_at<D>(
      a, [&](int r) { return r < from.rows ? from.data + r * from.stride : nullptr; }, from.head_dim, row);
}

/// Where one head's rows are written.
struct HeadOutput {
  __nv_bfloat16* data;
  std::int64_t stride;
  int rows;
  int head_dim;
};

/// Writes 16 rows x D of C fragments, the two halves of the rows times factor[0] and factor[1].
template <int D>
__device__ __forceinline__ void store_rows(const HeadOutput& to, int row, const float (&c)[D / 8][4],
                                           float factor_low, float factor_high) {
  const int g = lane_id() / 4, column = lane_id() % 4 * 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float factor = half == 0 ? factor_low : factor_high;
    const int at = row + g + 8 * half;
#pragma unroll
    for (int j = 0; j < D / 32; ++j) {
      std::uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        r[i] = pack_bf16(c[4 * j + i][2 * half] * factor, c[4 * j + i][2 * half + 1] * factor);
      }
      transpose_quad(r);
      if (at < to.rows && 32 * j + column < to.head_dim) {
        *reinterpret_cast<uint4*>(to.data + at * to.stride + 32 * j + column) =
            make_uint4(r[0], r[1], r[2], r[3]);
      }
    }
  }
}

}  // namespace fathom::cuda
