// Products of a few rows by a matrix of weights that is read once: y[m][r] = sum over k of x[m][k] * w[r][k].
//
// Tiles of eight of the matrix's rows are dealt to the blocks of threads in order. Of each tile a warp takes
// some runs of 32 columns, and what the warps have is added up afterwards; or each warp has whole tiles of
// its own, where there are enough. A run is one operand of two of the tensor core's m16n8k16 (mma.cuh), with
// the rows x as the other one. Which column stands for which k within a run does not matter to a sum, as long
// as both operands agree: lane 4g+c holds the columns 8c .. 8c+7 of row g, the words p, q, r, s.
//
// Rows x lie in shared memory as the tensor core wants them, so that no register has to be moved. Up to eight
// rows: x's words in the order p, r, q, s. Then one product with (p, q) has x_p w_p + x_q w_q in row g of its
// result, and another one with (r, s) has x_r w_r + x_s w_s in row g + 8. Up to sixteen: row g and row g + 8
// word by word.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/mma.cuh"

namespace fathom::cuda {

/// The shape of a matrix, and what of it is this block's. The same in all layers, so it is worked out once.
struct Matrix {
  int rows, width;  // width: a multiple of 32, at least 256
  int half;   // not 0: a tile has four rows of the first half and the four that belong to them of the second
  int alone;  // 1: each warp has tiles of its own; 0: all warps share a tile's columns
  int first, tiles;  // of this block

  __device__ void deal(int matrix_rows, int matrix_width, int matrix_half, int warps_alone) {
    rows = matrix_rows, width = matrix_width, half = matrix_half, alone = warps_alone;
    const long long all = half > 0 ? (half + 3) / 4 : (rows + 7) / 8;
    first = static_cast<int>(all * blockIdx.x / gridDim.x);
    tiles = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x) - first;
  }
  /// Row g of a tile; past the end the last one, whose result nobody takes.
  __device__ __forceinline__ int row(int tile, int g) const {
    if (half == 0) return min(tile * 8 + g, rows - 1);
    return min(tile * 4 + g % 4, half - 1) + (g < 4 ? 0 : half);
  }
  /// This warp's first tile, of this block's, and the step to the next.
  __device__ __forceinline__ int warp_first() const {
    return alone != 0 ? static_cast<int>(threadIdx.x) / 32 : 0;
  }
  __device__ __forceinline__ int warp_step() const { return alone != 0 ? kDecodeWarps : 1; }
  /// Columns: this warp's first one, from one run of it to the next, and how many runs.
  __device__ __forceinline__ int offset() const {
    return alone != 0 ? 0 : static_cast<int>(threadIdx.x) / 32 * 32;
  }
  __device__ __forceinline__ int apart() const { return alone != 0 ? 32 : 32 * kDecodeWarps; }
  __device__ __forceinline__ int runs() const {
    const int all = width / 32;
    return alone != 0 ? all : (all - static_cast<int>(threadIdx.x) / 32 + kDecodeWarps - 1) / kDecodeWarps;
  }
};

/// Rows x in shared memory. kHalves: 1 for up to eight rows, 2 for up to sixteen.
template <int kHalves>
struct Staged {
  /// Words from a row (or a pair of rows) to the next: 64 bytes beside a multiple of 128, so that eight rows'
  /// 16 bytes come without conflicts.
  static __host__ __device__ __forceinline__ int stride(int width) {
    const int words = kHalves * width / 2;
    return words % 32 == 0 ? words + 16 : words;
  }
  static __host__ __device__ __forceinline__ int bytes(int width, int rows) {
    return stride(width) * (kHalves == 1 ? rows : 8) * 4;
  }
  /// Two columns, e even.
  static __device__ __forceinline__ void put(std::uint32_t* staged, int stride, int row, int e,
                                             std::uint32_t word) {
    const int w = e % 8 / 2;
    if constexpr (kHalves == 1) {
      staged[row * stride + e / 8 * 4 + (w % 2 * 2 + w / 2)] = word;
    } else {
      staged[row % 8 * stride + e / 8 * 8 + 2 * w + row / 8] = word;
    }
  }
};

/// A warp's share of a matrix, on its way through a ring of its own in shared memory: kRing loads ahead of
/// what is computed. Opened before x is there, since weights wait for nothing. A lane reads what it loaded
/// itself, so nobody waits for anybody.
///
/// A few warps with much to do each: what counts is how many instructions follow one another. So runs are
/// taken several at a time, as many as divide a tile's, in loops without conditions that are short: a step
/// passes through its code once a phase, and code that the caches of instructions do not hold costs more than
/// it computes.
template <int kRing>
class WeightStream {
 public:
  static constexpr int kLoad = kDecodeThreads * 16;
  static constexpr int kBytes = kRing * kLoad;

  /// `ring`: kBytes of shared memory, 16-aligned.
  __device__ explicit WeightStream(unsigned char* ring)
      : ring_(ring + threadIdx.x * 16), ring_address_(shared_address(ring) + threadIdx.x * 16) {}

  /// The first loads begin. What was open before is given up.
  __device__ __forceinline__ void open(const __nv_bfloat16* data, const Matrix& m) {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, c = static_cast<int>(threadIdx.x) % 4;
    wait_copies<0>();
    const int step = m.warp_step(), first = m.warp_first();
    runs_ = m.runs();
    apart_ = m.apart();
    const int at_once = at_once_of(runs_);
    batches_ = runs_ / at_once;
    left_ = m.tiles > first ? (m.tiles - first + step - 1) / step * batches_ : 0;
    batch_ = batches_;
    // The last tile may have rows that there are not: their lanes go no further than the last one.
    const int from = m.row(m.first + first, g);
    row_jump_ = (m.half > 0 ? 4 : 8) * step;
    rows_left_ = m.half > 0 ? m.half - 1 - (from < m.half ? from : from - m.half) : m.rows - 1 - from;
    width_ = m.width;
    at_ = data + static_cast<std::int64_t>(from) * m.width + m.offset() + 8 * c;
    dispatch(at_once, [&](auto n) {
      constexpr int kRuns = decltype(n)::value;
#pragma unroll 1
      for (int i = 0; i < kRing / kRuns; ++i) load<kRuns>(i * kRuns * kLoad);
    });
  }

  /// The open matrix times the staged rows x; done(tile, sums) gets this warp's share of the sums: of lane
  /// 4g+c, sums[0], sums[1] are row g's for the tile's rows 2c and 2c+1, sums[2], sums[3] row g+8's.
  template <int kHalves, typename Done>
  __device__ __forceinline__ void run(const Matrix& m, const std::uint32_t* staged, int rows, Done&& done) {
    dispatch(at_once_of(runs_), [&](auto n) { run_by<kHalves, decltype(n)::value>(m, staged, rows, done); });
  }

 private:
  template <int kN>
  struct Number {
    static constexpr int value = kN;
  };
  /// The most of 11, 8, 4, 3, 1 that divides the runs and leaves the ring two places.
  static __device__ __forceinline__ int at_once_of(int runs) {
    if (kRing >= 22 && runs % 11 == 0) return 11;
    if (kRing >= 16 && runs % 8 == 0) return 8;
    if (kRing >= 8 && runs % 4 == 0) return 4;
    return runs % 3 == 0 ? 3 : 1;
  }
  template <typename Do>
  static __device__ __forceinline__ void dispatch(int at_once, Do&& what) {
    if (kRing >= 22 && at_once == 11) {
      what(Number<11>{});
    } else if (kRing >= 16 && at_once == 8) {
      what(Number<8>{});
    } else if (kRing >= 8 && at_once == 4) {
      what(Number<4>{});
    } else if (at_once == 3) {
      what(Number<3>{});
    } else {
      what(Number<1>{});
    }
  }
  template <int kHalves, int kRuns, typename Done>
  __device__ __forceinline__ void run_by(const Matrix& m, const std::uint32_t* staged, int rows,
                                         Done&& done) {
    constexpr int kPlaces = kRing / kRuns;
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, c = static_cast<int>(threadIdx.x) % 4;
    // Rows that there are not have somebody else's sums, which nobody takes.
    const int row = kHalves == 2 ? g : min(g, rows - 1);
    const std::uint32_t* const start =
        staged + row * Staged<kHalves>::stride(width_) + (m.offset() / 8 + c) * 4 * kHalves;
    const int apart = apart_ / 2 * kHalves;  // words
    int place = 0;
#pragma unroll 1
    for (int tile = m.warp_first(); tile < m.tiles; tile += m.warp_step()) {
      const std::uint32_t* x = start;
      float even[4] = {}, odd[4] = {};
#pragma unroll 1
      for (int i = 0; i < batches_; ++i) {
        uint4 w[kRuns];
        wait_copies<kPlaces - 1>();
#pragma unroll
        for (int j = 0; j < kRuns; ++j) w[j] = *reinterpret_cast<const uint4*>(ring_ + place + j * kLoad);
#pragma unroll
        for (int j = 0; j < kRuns; ++j, x += apart) {
          const uint4 a = *reinterpret_cast<const uint4*>(x);
          if constexpr (kHalves == 1) {
            mma(even, {a.x, a.y, a.z, a.w}, w[j].x, w[j].y);
            mma(odd, {a.x, a.y, a.z, a.w}, w[j].z, w[j].w);
          } else {
            const uint4 b = *reinterpret_cast<const uint4*>(x + 4);
            mma(even, {a.x, a.y, a.z, a.w}, w[j].x, w[j].y);
            mma(odd, {b.x, b.y, b.z, b.w}, w[j].z, w[j].w);
          }
        }
        load<kRuns>(place);
        place = place == (kPlaces - 1) * kRuns * kLoad ? 0 : place + kRuns * kLoad;
      }
      if constexpr (kHalves == 1) {
        even[0] += odd[2], even[1] += odd[3];
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) even[e] += odd[e];
      }
      done(tile, even);
    }
  }
  /// The next runs into a place. Also where nothing is left: copies are waited for by their number.
  template <int kRuns>
  __device__ __forceinline__ void load(int place) {
    if (left_ > 0) {
#pragma unroll
      for (int j = 0; j < kRuns; ++j) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(
                         ring_address_ + static_cast<unsigned>(place + j * kLoad)),
                     "l"(at_)
                     : "memory");
        at_ += apart_;
      }
      --left_;
      if (--batch_ == 0) {
        batch_ = batches_;
        const int jump = min(row_jump_, rows_left_);
        rows_left_ -= jump;
        at_ += static_cast<std::int64_t>(jump) * width_ - runs_ * apart_;
      }
    }
    commit_copies();
  }

  const unsigned char* ring_;
  unsigned ring_address_;
  int runs_, apart_, width_, batches_;  // runs and batches of them: of a tile
  int left_, batch_;                    // batches still to ask for, of all tiles and of this one
  int row_jump_, rows_left_;            // rows to the next tile's, and to the last one of the matrix
  const __nv_bfloat16* at_;
};

}  // namespace fathom::cuda
