// Hadamard transforms of bf16 rows on tensor cores. H_K (x) H_(2^m) = (H_M (x) I) (I (x) H_(2^r)) with M = K
// * 2^(m-r): the M x M part is a product of signs, which are exact in bf16, with the row's elements as they
// come, summed in fp32, and the rest are butterflies of those sums.
//
// A row is M lines of `columns` elements, which is 2^r * inner, once for each of its blocks. A thread block
// copies the lines of a group of rows to shared memory while it computes the group before. Eight columns of a
// block are a tile; a warp computes 16 results' lines of 16 tiles, which butterflies never leave. A tile's
// result does not depend on those beside it.
//
// Of M = 44 and 128 columns there go 9 * 16 tensor instructions, 192 shuffles and 1300 sums of a warp with 22
// KiB read and written: 1300 clocks of one multiprocessor's share of memory, and 240, 192 and 330 of its own.
#include <algorithm>

#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/row_packs.cuh"
#include "kernels/cuda/hadamard.h"

namespace fathom::cuda {

namespace {

constexpr int kMostWarps = 8;
constexpr int kWarpsAtOnce = 16;  // on a multiprocessor: what 128 registers allow
constexpr int kTiles = 16;        // of a warp: 128 columns
constexpr std::int64_t kMostOrder = 256;
constexpr std::int64_t kEnoughBytes = 16 << 10;  // of a group of rows

struct Arguments {
  bf16* y;
  const bf16* x;
  const float* matrix;
  std::int64_t x_row, y_row, rows;
  int factor, spread, order;   // M = factor << spread
  int blocks, columns, lines;  // columns: of a line; lines: of a row, blocks * order
  int line;                    // packs of 16 bytes from a line to the next in shared memory
  int group, groups, tiles;    // group: rows; tiles: of a group
  int from, to;                // the bits of a column's number that are transformed
  float scale;
};

/// Where a tile lies.
struct Tile {
  int shared;  // packs, from the group's first
  int y;       // elements, from the group's first row
  int row;     // of the group
};

/// What a thread block has in shared memory: two groups of rows; zeros; signs; the tiles; the matrix's signs.
struct Layout {
  int group_packs, order_tiles, tiles, matrix_bytes;

  __host__ __device__ explicit Layout(const Arguments& a)
      : group_packs(a.group * a.lines * a.line),
        order_tiles((a.order + 15) / 16),
        tiles(a.tiles),
        matrix_bytes(a.factor * a.factor / 4) {}
  __host__ __device__ int zeros() const { return 2 * group_packs * 16; }
  __host__ __device__ int signs() const { return zeros() + 16; }
  __host__ __device__ int all_tiles() const { return signs() + order_tiles * order_tiles * 32 * 4; }
  __host__ __device__ int matrix() const { return all_tiles() + tiles * static_cast<int>(sizeof(Tile)); }
  __host__ __device__ int bytes() const { return matrix() + matrix_bytes; }
};

/// Copies the rows of a group that there are, in the background.
__device__ __forceinline__ void copy_group(uint4* to, const Arguments& a, int group) {
  const int threads = static_cast<int>(blockDim.x), of_line = a.columns / 8;
  const int step_lines = threads / of_line, step = threads % of_line;
  const std::int64_t first = static_cast<std::int64_t>(group) * a.group;
  const int rows = static_cast<int>(min(static_cast<std::int64_t>(a.group), a.rows - first));
  for (int r = 0; r < rows; ++r) {
    const bf16* row = a.x + (first + r) * a.x_row;
    uint4* shared = to + r * a.lines * a.line;
    int line = static_cast<int>(threadIdx.x) / of_line, pack = static_cast<int>(threadIdx.x) % of_line;
    for (int i = static_cast<int>(threadIdx.x); i < a.lines * of_line; i += threads) {
      copy_async(shared + line * a.line + pack, row + i * 8, true);
      line += step_lines;
      pack += step;
      if (pack >= of_line) {
        pack -= of_line;
        ++line;
      }
    }
  }
}

/// The matrix's signs, four a byte: 1 where it is negative.
__device__ __forceinline__ void read_matrix(unsigned char* signs, const Arguments& a) {
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < a.factor * a.factor / 4;
       i += static_cast<int>(blockDim.x)) {
    const float4 four = reinterpret_cast<const float4*>(a.matrix)[i];
    signs[i] = static_cast<unsigned char>((four.x < 0 ? 1 : 0) | (four.y < 0 ? 2 : 0) | (four.z < 0 ? 4 : 0) |
                                          (four.w < 0 ? 8 : 0));
  }
}

/// The signs of H_M as the lanes of mma hold them (mma.cuh): of register r the two are bits 15 - r and 31 -
/// r. There are some behind the M-th row, whose results nobody wants, and column, where there are zeros.
__device__ __forceinline__ void arrange_signs(unsigned* words, const unsigned char* matrix,
                                              const Arguments& a) {
  const int order_tiles = (a.order + 15) / 16, mask = (1 << a.spread) - 1;
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

__device__ __forceinline__ void place_tiles(Tile* tiles, const Arguments& a) {
  const int of_line = a.columns / 8, of_row = a.blocks * of_line;
  for (int t = static_cast<int>(threadIdx.x); t < a.tiles; t += static_cast<int>(blockDim.x)) {
    const int row = t / of_row, block = t % of_row / of_line, pack = t % of_line;
    tiles[t] = {(row * a.lines + block * a.order) * a.line + pack,
                static_cast<int>(row * a.y_row) + block * a.order * a.columns + pack * 8, row};
  }
}

using Sums = float[kTiles][4];  // c of mma for each tile

template <int kBit>
__device__ __forceinline__ void butterflies_of_tiles(Sums& c) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    if ((t >> kBit & 1) != 0) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float low = c[t][e], high = c[t + (1 << kBit)][e];
      c[t][e] = low + high;
      c[t + (1 << kBit)][e] = low - high;
    }
  }
}
/// A lane's number and a tile's trade their bit kBit: what was a lane's bit is then one of registers.
template <int kBit>
__device__ __forceinline__ void trade(Sums& c) {
  constexpr int kApart = 1 << kBit;
  const bool upper = (threadIdx.x & kApart) != 0;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    if ((t & kApart) != 0) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float given = upper ? c[t][e] : c[t + kApart][e];
      const float got = __shfl_xor_sync(kFullWarp, given, kApart);
      if (upper) {
        c[t][e] = got;
      } else {
        c[t + kApart][e] = got;
      }
    }
  }
}

/// A column's number is its tile's, times eight, and three bits within the tile: the low one is a register's,
/// the others a lane's. Afterwards lane c % 4 has, of every fourth tile from that one on, all eight columns.
__device__ __forceinline__ void transform_columns(Sums& c, int from, int to) {
  if (from <= 0 && to > 0) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const float low = c[t][e], high = c[t][e + 1];
        c[t][e] = low + high;
        c[t][e + 1] = low - high;
      }
    }
  }
  if (from <= 3 && to > 3) butterflies_of_tiles<0>(c);
  if (from <= 4 && to > 4) butterflies_of_tiles<1>(c);
  if (from <= 5 && to > 5) butterflies_of_tiles<2>(c);
  if (from <= 6 && to > 6) butterflies_of_tiles<3>(c);
  trade<0>(c);
  trade<1>(c);
  if (from <= 1 && to > 1) butterflies_of_tiles<0>(c);
  if (from <= 2 && to > 2) butterflies_of_tiles<1>(c);
}

/// Reads x, writes y: 2 * rows * width elements.
__global__ void __launch_bounds__(32 * kMostWarps, 2) signs_kernel(Arguments a) {
  extern __shared__ uint4 shared[];
  auto* bytes = reinterpret_cast<unsigned char*>(shared);
  const Layout at(a);
  auto* signs = reinterpret_cast<unsigned*>(bytes + at.signs());
  auto* tiles = reinterpret_cast<Tile*>(bytes + at.all_tiles());
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int tasks = at.order_tiles * ((a.tiles + kTiles - 1) / kTiles);
  copy_group(shared, a, static_cast<int>(blockIdx.x));
  commit_copies();
  if (threadIdx.x == 0) shared[2 * at.group_packs] = make_uint4(0, 0, 0, 0);
  read_matrix(bytes + at.matrix(), a);
  place_tiles(tiles, a);
  __syncthreads();
  arrange_signs(signs, bytes + at.matrix(), a);
  int first_pack = 0;  // of the group's copy
  for (int group = static_cast<int>(blockIdx.x); group < a.groups; group += static_cast<int>(gridDim.x)) {
    const int next = group + static_cast<int>(gridDim.x);
    if (next < a.groups) copy_group(shared + (at.group_packs - first_pack), a, next);
    commit_copies();
    wait_copies<1>();
    __syncthreads();
    for (int task = warp; task < tasks; task += warps) {
      const int line_tile = task % at.order_tiles, first_tile = task / at.order_tiles * kTiles;
      // Lanes name the lines of two tiles, and 16 of each, to ldmatrix. Behind a group's last tile is any.
      int from[kTiles / 2];
#pragma unroll
      for (int t = 0; t < kTiles / 2; ++t) {
        const int tile = min(first_tile + 2 * t + lane / 16, a.tiles - 1);
        from[t] = first_pack + tiles[tile].shared + lane % 16 * a.line;
      }
      Sums c = {};
#pragma unroll 1
      for (int k = 0; k < at.order_tiles; ++k) {
        const unsigned word = signs[(line_tile * at.order_tiles + k) * 32 + lane];
        std::uint32_t ones[4];
#pragma unroll
        for (int r = 0; r < 4; ++r) ones[r] = (word << r & 0x80008000U) | 0x3f803f80U;
        const bool there = k * 16 + lane % 16 < a.order;
#pragma unroll
        for (int t = 0; t < kTiles / 2; ++t) {
          std::uint32_t x[4];
          load_matrices_transposed(x, shared + (there ? from[t] : 2 * at.group_packs));
          mma(c[2 * t], ones, x[0], x[1]);
          mma(c[2 * t + 1], ones, x[2], x[3]);
          from[t] += 16 * a.line;
        }
      }
      transform_columns(c, a.from, a.to);
      const std::int64_t first_row = static_cast<std::int64_t>(group) * a.group;
#pragma unroll
      for (int t = 0; t < kTiles; t += 4) {
        const int number = first_tile + t + lane % 4;
        if (number >= a.tiles) continue;
        const Tile tile = tiles[number];
        if (first_row + tile.row >= a.rows) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int line = line_tile * 16 + lane / 4 + 8 * half;
          if (line >= a.order) continue;
          Pack<bf16> pack;
#pragma unroll
          for (int e = 0; e < 8; ++e) pack.v[e] = c[t + e / 2][2 * half + e % 2] * a.scale;
          store_raw(a.y + first_row * a.y_row + tile.y + line * a.columns, repack(pack));
        }
      }
    }
    __syncthreads();  // the copies after next go where this group's lie
    first_pack = at.group_packs - first_pack;
  }
}

bool is_power_of_two(std::int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

/// False: the shape is none for these kernels.
bool arrange(Arguments& a, const HadamardShape& s) {
  std::int64_t power = s.power, columns = s.power * s.inner, order = s.factor;
  // As many columns as a warp has, and 16 lines or so for the tensor cores. Butterflies are of a warp's
  // columns alone, and want powers of two.
  while (power > 1 && (columns > 8 * kTiles || order < 9 || !is_power_of_two(columns)) && columns % 16 == 0) {
    power /= 2, columns /= 2, order *= 2;
    ++a.spread;
  }
  if (columns % 8 != 0 || order < 8 || order > kMostOrder || order % 4 != 0) return false;
  if (s.factor > 1 && s.factor % 4 != 0) return false;
  if (power > 1 && (columns > 8 * kTiles || !is_power_of_two(columns))) return false;
  constexpr std::int64_t kMostElements = 1 << 20;  // of a row: what there is of it fits 32 bits by far
  if (s.width() > kMostElements || s.y_row() > kMostElements || s.rows > kMostElements * 1024) return false;
  while (power > 1 && (std::int64_t{1} << a.from) < s.inner) ++a.from;
  a.to = a.from;
  while (power > 1 && (std::int64_t{1} << a.to) < columns) ++a.to;
  a.factor = static_cast<int>(s.factor);
  a.order = static_cast<int>(order);
  a.blocks = static_cast<int>(s.blocks);
  a.columns = static_cast<int>(columns);
  a.lines = a.blocks * a.order;
  a.line = a.columns / 8 | 1;  // odd: eight lines' packs are in different banks
  return true;
}

int tasks_of(const Arguments& a) {
  return (a.order + 15) / 16 * static_cast<int>(blocks_for(a.tiles, kTiles));
}

void set_group(Arguments& a, int rows) {
  a.group = rows;
  a.groups = static_cast<int>(blocks_for(a.rows, rows));
  a.tiles = rows * a.blocks * (a.columns / 8);
}

/// Rows that fill warps' tiles, and are some work, if then there is a group for each multiprocessor.
void choose_group(Arguments& a, int multiprocessors) {
  set_group(a, 1);
  while (a.rows / (2 * a.group) >= multiprocessors && (a.tiles % kTiles != 0 || tasks_of(a) < 4) &&
         2 * a.group * a.lines * a.line * 16 <= kEnoughBytes)
    set_group(a, 2 * a.group);
}

}  // namespace

bool hadamard_by_signs(const HadamardOperands<bf16>& h, int multiprocessors, cudaStream_t stream) {
  const HadamardShape& s = h.s;
  Arguments a{};
  const bool whole = packs<bf16>(h.x, s.width()) && aligned(h.y) && aligned(h.matrix) && s.x_row() % 8 == 0 &&
                     s.y_row() % 8 == 0;
  if (!whole || !arrange(a, s)) return false;
  a.y = h.y, a.x = h.x, a.matrix = h.matrix;
  a.x_row = s.x_row(), a.y_row = s.y_row(), a.rows = s.rows;
  a.scale = h.scale();
  if (a.rows == 0) return true;
  choose_group(a, multiprocessors);
  const std::int64_t most = most_shared_bytes();
  if (std::int64_t{2} * a.group * a.lines * a.line * 16 > most) return false;
  const int bytes = Layout(a).bytes();
  if (bytes + 1024 > most) return false;
  const int tasks = tasks_of(a), rounds = (tasks + kMostWarps - 1) / kMostWarps;
  const int warps = (tasks + rounds - 1) / rounds;
  const auto fit = static_cast<int>((most + 1024) / (bytes + 1024));
  const int at_once = multiprocessors * std::max(1, std::min(fit, kWarpsAtOnce / warps));
  // The same number of groups for each thread block, give or take one.
  const int of_each = (a.groups + at_once - 1) / at_once;
  launch("hadamard_forward", signs_kernel,
         {blocks_for(a.groups, of_each), static_cast<unsigned>(32 * warps), static_cast<std::size_t>(bytes)},
         stream, a);
  return true;
}

}  // namespace fathom::cuda
