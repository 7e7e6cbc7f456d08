// Hadamard transforms of bf16 rows on tensor cores (device/hadamard_signs.cuh), of lines of any length up to
// 128; hadamard_lines.cu has those of 128.
//
// A thread block copies the lines of a group of rows to shared memory while it computes the group before.
#include <algorithm>

#include "kernels/cuda/device/hadamard_signs.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/hadamard.h"

namespace fathom::cuda {

namespace {

constexpr int kMostWarps = 8;
constexpr int kWarpsAtOnce = 16;  // on a multiprocessor: what 128 registers allow
constexpr int kTiles = kSignTiles;
constexpr std::int64_t kEnoughBytes = 16 << 10;  // of a group of rows

struct Arguments : SignsShape {
  bf16* y;
  const bf16* x;
  const float* matrix;
  std::int64_t x_row, y_row, rows;
  int lines, line;           // lines of a row; packs of 16 bytes from a line to the next in shared memory
  int group, groups, tiles;  // group: rows; tiles: of a group
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
        order_tiles(a.order_tiles()),
        tiles(a.tiles),
        matrix_bytes(a.matrix_bytes()) {}
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

__device__ __forceinline__ void place_tiles(Tile* tiles, const Arguments& a) {
  const int of_line = a.columns / 8, of_row = a.blocks * of_line;
  for (int t = static_cast<int>(threadIdx.x); t < a.tiles; t += static_cast<int>(blockDim.x)) {
    const int row = t / of_row, block = t % of_row / of_line, pack = t % of_line;
    tiles[t] = {(row * a.lines + block * a.order) * a.line + pack,
                static_cast<int>(row * a.y_row) + block * a.order * a.columns + pack * 8, row};
  }
}

/// A lane's number and a tile's trade their bit kBit: what was a lane's bit is then one of registers.
template <int kBit>
__device__ __forceinline__ void trade(Sums& c) {
  constexpr int kApart = 1 << kBit;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
    if ((t & kApart) != 0) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float got = traded(c[t][e], c[t + kApart][e], kApart);
      const bool upper = (threadIdx.x & kApart) != 0;
      c[t + kApart][e] = upper ? c[t + kApart][e] : got;
      c[t][e] = upper ? got : c[t][e];
    }
  }
}

/// A column's number is its tile's, times eight, and three bits within the tile: the low one is a register's,
/// the others a lane's. Afterwards lane c % 4 has, of every fourth tile from that one on, all eight columns.
__device__ __forceinline__ void transform_columns(Sums& c, int from, int to) {
  if (from <= 0 && to > 0) butterflies_within_pairs(c);
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
  read_matrix(bytes + at.matrix(), a.matrix, a);
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

int tasks_of(const Arguments& a) { return a.order_tiles() * static_cast<int>(blocks_for(a.tiles, kTiles)); }

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
  if (!whole || !cut_up(a, s)) return false;
  a.lines = a.blocks * a.order;
  a.line = a.columns / 8 | 1;  // odd: eight lines' packs are in different banks
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
