// C[m][n] = (C +) sum over k of A[m][k] * B[k][n], for tiles that stay in the cache.
//
// The lanes of a vector are columns, and every element is one chain of multiply-adds over ascending k: its
// value depends on its row of A and its column of B only, not on the shape or the position of the tile.
// Cutting k into several calls that accumulate gives the same bits. Attention and the row-invariant products
// rest on this.
#pragma once

#include <cstdint>

#include "kernels/cpu/isa/simd.h"

namespace fathom::cpu::FATHOM_ISA {

/// Element (m, k) is data[m * row + k * step]: a matrix or its transpose.
template <typename T>
struct TileA {
  const T* data;
  std::int64_t row;
  std::int64_t step;
};

enum class TileStart : std::uint8_t { Zero, Accumulate };

constexpr int kBlockRows = 6;

template <typename T, int rows, int vectors>
[[gnu::noinline]] void tile_block(std::int64_t k, TileA<T> a, const T* b, std::int64_t ldb, T* c,
                                  std::int64_t ldc, TileStart start) {
  constexpr int W = kLanes<T>;
  Vec<T> sum[rows][vectors] = {};
  if (start == TileStart::Accumulate) {
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < vectors; ++n) sum[m][n] = load<T>(c + m * ldc + n * W);
    }
  }
  const T* row[rows];
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) row[m] = a.data + m * a.row;
  for (std::int64_t i = 0; i < k; ++i) {
    Vec<T> column[vectors];
#pragma GCC unroll 8
    for (int n = 0; n < vectors; ++n) column[n] = load<T>(b + i * ldb + n * W);
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
      const Vec<T> x = broadcast<T>(row[m][i * a.step]);
#pragma GCC unroll 8
      for (int n = 0; n < vectors; ++n) sum[m][n] += x * column[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 8
    for (int n = 0; n < vectors; ++n) store<T>(c + m * ldc + n * W, sum[m][n]);
  }
}

template <typename T, int vectors>
void tile_rows(std::int64_t m, std::int64_t k, TileA<T> a, const T* b, std::int64_t ldb, T* c,
               std::int64_t ldc, TileStart start) {
  for (; m >= kBlockRows; m -= kBlockRows) {
    tile_block<T, kBlockRows, vectors>(k, a, b, ldb, c, ldc, start);
    a.data += kBlockRows * a.row;
    c += kBlockRows * ldc;
  }
  switch (m) {
    case 5:
      return tile_block<T, 5, vectors>(k, a, b, ldb, c, ldc, start);
    case 4:
      return tile_block<T, 4, vectors>(k, a, b, ldb, c, ldc, start);
    case 3:
      return tile_block<T, 3, vectors>(k, a, b, ldb, c, ldc, start);
    case 2:
      return tile_block<T, 2, vectors>(k, a, b, ldb, c, ldc, start);
    case 1:
      return tile_block<T, 1, vectors>(k, a, b, ldb, c, ldc, start);
    default:
      return;
  }
}

/// C is [m][vectors * lanes], B is [k][vectors * lanes]: whole vectors, so their buffers are padded.
template <typename T>
void tile_gemm(std::int64_t m, std::int64_t vectors, std::int64_t k, TileA<T> a, const T* b, std::int64_t ldb,
               T* c, std::int64_t ldc, TileStart start) {
  while (vectors > 0) {
    const std::int64_t now = vectors < kColumnVectors ? vectors : kColumnVectors;
    if (now == 1) tile_rows<T, 1>(m, k, a, b, ldb, c, ldc, start);
    if (now == 2) tile_rows<T, 2>(m, k, a, b, ldb, c, ldc, start);
    if constexpr (kColumnVectors >= 4) {
      if (now == 3) tile_rows<T, 3>(m, k, a, b, ldb, c, ldc, start);
      if (now == 4) tile_rows<T, 4>(m, k, a, b, ldb, c, ldc, start);
    }
    b += now * kLanes<T>;
    c += now * kLanes<T>;
    vectors -= now;
  }
}

/// C[m][lane] += sum over k <= lane - shift of A[m][k] * B[k][lane], for one vector of lanes. What a lane
/// must not see does not touch it, not even as 0 * NaN.
template <typename T>
void tile_gemm_causal(std::int64_t m, std::int64_t k, TileA<T> a, const T* b, std::int64_t ldb, T* c,
                      std::int64_t ldc, std::int64_t shift) {
  const IndexVec<T> lanes = lane_numbers<T>();
  using Index = typename LaneIndex<T>::type;
  constexpr int kRows = 8;
  for (; m > 0; m -= kRows) {
    const int rows = m < kRows ? static_cast<int>(m) : kRows;
    Vec<T> sum[kRows];
    const T* row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const int held = r < rows ? r : 0;
      row[r] = a.data + held * a.row;
      sum[r] = load<T>(c + held * ldc);
    }
    for (std::int64_t i = 0; i < k; ++i) {
      const IndexVec<T> sees = lanes >= static_cast<Index>(shift + i);
      const Vec<T> column = load<T>(b + i * ldb);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> next = sum[r] + broadcast<T>(row[r][i * a.step]) * column;
        sum[r] = sees ? next : sum[r];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (r < rows) store<T>(c + r * ldc, sum[r]);
    }
    a.data += kRows * a.row;
    c += kRows * ldc;
  }
}

}  // namespace fathom::cpu::FATHOM_ISA
