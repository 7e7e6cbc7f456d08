// Hadamard transforms of bf16 rows on tensor cores. H_K (x) H_(2^m) = (H_M (x) I) (I (x) H_(2^r)) with M = K
// * 2^(m-r): the M x M part is a product of signs, which are exact in bf16, with the row's elements as they
// come, summed in fp32, and the rest are butterflies of those sums.
//
// A row is M lines of `columns` elements, which is 2^r * inner, once for each of its blocks. Eight columns of
// a block are a tile; a warp has 16 results' lines of 16 tiles in its registers, which butterflies never
// leave. A tile's result does not depend on those beside it.
#pragma once

#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/row_packs.cuh"
#include "kernels/row_codes.h"

namespace fathom::cuda {

constexpr int kSignTiles = 16;  // of a warp: 128 columns

/// How a transform is cut up.
struct SignsShape {
  int factor, spread, order;  // M = factor << spread
  int blocks, columns;        // columns: of a line; a row has blocks * order lines
  int from, to;               // the bits of a column's number that are transformed

  __host__ __device__ int order_tiles() const { return (order + 15) / 16; }
  __host__ __device__ int sign_words() const { return order_tiles() * order_tiles() * 32; }
  __host__ __device__ int matrix_bytes() const { return (factor * factor / 4 + 15) / 16 * 16; }
};

/// False: tensor cores do not take the shape.
inline bool cut_up(SignsShape& a, const HadamardShape& s) {
  constexpr std::int64_t kMostOrder = 256;
  const auto is_power_of_two = [](std::int64_t n) { return n > 0 && (n & (n - 1)) == 0; };
  std::int64_t power = s.power, columns = s.power * s.inner, order = s.factor;
  a = {};
  // As many columns as a warp has, and 16 lines or so for the tensor cores. Butterflies are of a warp's
  // columns alone, and want powers of two.
  while (power > 1 && (columns > 8 * kSignTiles || order < 9 || !is_power_of_two(columns)) &&
         columns % 16 == 0) {
    power /= 2, columns /= 2, order *= 2;
    ++a.spread;
  }
  if (columns % 8 != 0 || order < 8 || order > kMostOrder || order % 4 != 0) return false;
  if (s.factor > 1 && s.factor % 4 != 0) return false;
  if (power > 1 && (columns > 8 * kSignTiles || !is_power_of_two(columns))) return false;
  constexpr std::int64_t kMostElements = 1 << 20;  // of a row: what there is of it fits 32 bits by far
  if (s.width() > kMostElements || s.y_row() > kMostElements || s.rows > kMostElements * 1024) return false;
  while (power > 1 && (std::int64_t{1} << a.from) < s.inner) ++a.from;
  a.to = a.from;
  while (power > 1 && (std::int64_t{1} << a.to) < columns) ++a.to;
  a.factor = static_cast<int>(s.factor);
  a.order = static_cast<int>(order);
  a.blocks = static_cast<int>(s.blocks);
  a.columns = static_cast<int>(columns);
  return true;
}

/// The matrix's signs, four a byte: 1 where it is negative.
__device__ __forceinline__ void read_matrix(unsigned char* signs, const float* matrix, const SignsShape& a) {
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < a.factor * a.factor / 4;
       i += static_cast<int>(blockDim.x)) {
    const float4 four = reinterpret_cast<const float4*>(matrix)[i];
    signs[i] = static_cast<unsigned char>((four.x < 0 ? 1 : 0) | (four.y < 0 ? 2 : 0) | (four.z < 0 ? 4 : 0) |
                                          (four.w < 0 ? 8 : 0));
  }
}

/// The signs of H_M as the lanes of mma hold them (mma.cuh): of register r the two are bits 15 - r and 31 -
/// r. There are some behind the M-th row, whose results nobody wants, and column, where there are zeros.
__device__ __forceinline__ void arrange_signs(unsigned* words, const unsigned char* matrix,
                                              const SignsShape& a) {
  const int order_tiles = a.order_tiles(), mask = (1 << a.spread) - 1;
  for (int n = static_cast<int>(threadIdx.x); n < order_tiles * order_tiles * 32;
       n += static_cast<int>(blockDim.x)) {
    const int lane = n % 32, tile = n / 32;
    unsigned word = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int i = min(tile / order_tiles * 16 + lane / 4 + r % 2 * 8, a.order - 1);
      const int j = min(tile % order_tiles * 16 + lane % 4 * 2 + r / 2 * 8, a.order - 2);
#pragma unroll
      for (int high = 0; high < 2; ++high) {
        const int row = i >> a.spread, column = (j + high) >> a.spread;
        unsigned negative = __popc(i & (j + high) & mask) & 1;
        if (a.factor > 1)
          negative ^= static_cast<unsigned>(matrix[row * (a.factor / 4) + column / 4]) >> (column % 4) & 1;
        word |= negative << (15 - r + 16 * high);
      }
    }
    words[n] = word;
  }
}

using Sums = float[kSignTiles][4];  // c of mma for each tile

template <int kBit>
__device__ __forceinline__ void butterflies_of_tiles(Sums& c) {
#pragma unroll
  for (int t = 0; t < kSignTiles; ++t) {
    if ((t >> kBit & 1) != 0) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float low = c[t][e], high = c[t + (1 << kBit)][e];
      c[t][e] = low + high;
      c[t + (1 << kBit)][e] = low - high;
    }
  }
}
__device__ __forceinline__ void butterflies_within_pairs(Sums& c) {
#pragma unroll
  for (int t = 0; t < kSignTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 4; e += 2) {
      const float low = c[t][e], high = c[t][e + 1];
      c[t][e] = low + high;
      c[t][e + 1] = low - high;
    }
  }
}

/// What a lane gives away where its number and a tile's trade a bit, and what it keeps.
template <typename T>
__device__ __forceinline__ T traded(T low, T high, int apart) {
  return __shfl_xor_sync(kFullWarp, (threadIdx.x & apart) != 0 ? low : high, apart);
}
template <typename T>
__device__ __forceinline__ T kept(T low, T high, int apart) {
  return (threadIdx.x & apart) != 0 ? high : low;
}

}  // namespace fathom::cuda
