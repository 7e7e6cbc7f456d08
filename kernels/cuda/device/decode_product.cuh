// Products of a few rows by a matrix of weights that is read once: y[m][r] = sum over k of x[m][k] * w[r][k].
//
// Tiles of eight of the matrix's rows are dealt to the blocks of threads in order. Of each tile a warp takes
// some runs of 32 columns, and what the warps have is added up afterwards. A run is one operand of two of the
// tensor core's m16n8k16 (mma.cuh), with the rows x as the other one. Which column stands for which k within
// a run does not matter to a sum, as long as both operands agree: lane 4g+c holds the columns 8c .. 8c+7 of
// row g, the words p, q, r, s.
//
// Rows x lie in shared memory as the tensor core wants them, so that no register has to be moved. Up to eight
// rows: x's words in the order p, r, q, s. Then one product with (p, q) has x_p w_p + x_q w_q in row g of its
// result, and another one with (r, s) has x_r w_r + x_s w_s in row g + 8. Up to sixteen: row g and row g + 8
// word by word.
//
// Where warps of their own bring the weights, these are cut otherwise (decode_lines.cuh).
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/mma.cuh"

namespace fathom::cuda {

/// From one run of a warp's columns to its next one, in elements: every warp has one of 32 in between.
inline constexpr int kRunsApart = 32 * kDecodeWarps;

/// The shape of a matrix, and what of it is this block's. The same in all layers, so it is worked out once.
struct Matrix {
  int rows, width;  // width: a multiple of 32, at least 256
  int half;  // not 0: a tile has four rows of the first half and the four that belong to them of the second
  int first, tiles;  // of this block
  int at_once;       // runs that are taken at once: divides the runs of all warps
  int places;        // so many times as many the ring holds
  // Of lines (decode_lines.cuh), where they come so, and `at_once` counts their units:
  int parts;    // that a row is cut into: one a warp, or half as many and each quad has its own warps
  int units;    // of a part, at the most
  int batches;  // so many times `at_once` a whole part has, of a tile or of a quad

  /// `ring`: runs that a warp's ring holds.
  __device__ void deal(int matrix_rows, int matrix_width, int matrix_half, int ring) {
    rows = matrix_rows, width = matrix_width, half = matrix_half;
    const long long all = half > 0 ? (half + 3) / 4 : (rows + 7) / 8;
    first = static_cast<int>(all * blockIdx.x / gridDim.x);
    tiles = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x) - first;
    const int runs = width % kRunsApart == 0 ? width / kRunsApart : 1;
    at_once = 1;
    for (const int n : {3, 4, 8, 11}) {
      if (runs % n == 0 && ring >= 2 * n) at_once = n;
    }
    places = ring / at_once;
  }
  /// Row g of a tile; past the end the last one, whose result nobody takes.
  __device__ __forceinline__ int row(int tile, int g) const {
    if (half == 0) return min(tile * 8 + g, rows - 1);
    return min(tile * 4 + g % 4, half - 1) + (g < 4 ? 0 : half);
  }
  /// Whether a ring that goes round is always at the beginning of a tile.
  __device__ __forceinline__ bool places_are_whole_tiles() const {
    return width % kRunsApart == 0 && places % (width / kRunsApart / at_once) == 0;
  }
  /// Of this warp, in a tile.
  __device__ __forceinline__ int runs() const {
    return (width / 32 - static_cast<int>(threadIdx.x) / 32 + kDecodeWarps - 1) / kDecodeWarps;
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
  /// Eight columns, e a multiple of eight.
  static __device__ __forceinline__ void put(std::uint32_t* staged, int stride, int row, int e, uint4 words) {
    if constexpr (kHalves == 1) {
      *reinterpret_cast<uint4*>(staged + row * stride + e / 2) = uint4{words.x, words.z, words.y, words.w};
    } else {
      std::uint32_t* const to = staged + row % 8 * stride + e + row / 8;
      to[0] = words.x, to[2] = words.y, to[4] = words.z, to[6] = words.w;
    }
  }
};

/// A warp's share of a matrix, on its way through a ring of its own in shared memory: kRing loads ahead of
/// what is computed. Opened before x is there, since weights wait for nothing. A lane reads what it loaded
/// itself, so nobody waits for anybody.
///
/// A few warps with much to do each: what counts is how many instructions follow one another. So runs are
/// taken several at a time, as many as divide a tile's, in loops that are short and whose addresses are a
/// register and a constant: a step passes through its code once a phase, and code that the caches of
/// instructions do not hold costs more than it computes.
///
/// Loads that are asked for come in turn: what else is read waits for them. So open() asks for half of a ring
/// where a matrix fills more than one, and rest(), when the rows x are there, for the other half.
template <int kRing>
class WeightStream {
 public:
  static constexpr int kLoad = kRingLoad;
  static constexpr int kBytes = kRing * kLoad;

  /// `ring`: kBytes of shared memory, 16-aligned.
  __device__ explicit WeightStream(unsigned char* ring)
      : ring_address_(shared_address(ring) + threadIdx.x * 16) {}

  /// The first loads begin. What was open before is given up. rest() before run(); `followed`: follow().
  __device__ __forceinline__ void open(const __nv_bfloat16* data, const Matrix& m, bool followed) {
    wait_copies<0>();
    at_once_ = m.at_once;
    places_ = m.places;
    place_ = 0;
    filled_ = 0;
    aim(data, m);
    fill(left_ > places_ ? (places_ + 1) / 2 : left_);
    if (left_ > 0 || followed) return;
    for (; filled_ < places_; ++filled_) commit_copies();  // they are waited for by their number
  }
  /// Nothing is open any more: no register has to hold what was.
  __device__ __forceinline__ void close() {
    at_once_ = places_ = place_ = filled_ = batches_ = batch_ = left_ = next_tile_ = 0;
    at_ = last_ = after_ = nullptr;
    after_matrix_ = nullptr;
  }
  /// The rest of the ring.
  __device__ __forceinline__ void rest() {
    if (filled_ < places_) fill(places_);
  }
  /// The same, and behind the open matrix's last loads come those of another one of the same width, which is
  /// multiplied next: it is open then. Loads turn to it at the end of a tile that is multiplied, so that must
  /// be where they end: places_are_whole_tiles().
  __device__ __forceinline__ void follow(const __nv_bfloat16* data, const Matrix& m) {
    after_ = data;
    after_matrix_ = &m;
    if (left_ == 0) aim(data, m);
    rest();
  }

  /// Tiles `tile` to `end` of the open matrix, those before having been taken, times the staged rows x;
  /// done(tile, sums) gets this warp's share of the sums: of lane 4g+c, sums[0], sums[1] are row g's for the
  /// tile's rows 2c and 2c+1, sums[2], sums[3] row g+8's.
  template <int kHalves, typename Done>
  __device__ __forceinline__ void run(const Matrix& m, const std::uint32_t* staged, int rows, int tile,
                                      int end, Done&& done) {
    dispatch([&](auto n) { run_by<kHalves, decltype(n)::value>(m, staged, rows, tile, end, done); });
  }

 private:
  template <int kN>
  struct Number {
    static constexpr int value = kN;
  };
  template <typename Do>
  __device__ __forceinline__ void dispatch(Do&& what) const {
    if (kRing >= 22 && at_once_ == 11) {
      what(Number<11>{});
    } else if (kRing >= 16 && at_once_ == 8) {
      what(Number<8>{});
    } else if (kRing >= 8 && at_once_ == 4) {
      what(Number<4>{});
    } else if (at_once_ == 3) {
      what(Number<3>{});
    } else {
      what(Number<1>{});
    }
  }
  template <int kHalves, int kRuns, typename Done>
  __device__ __forceinline__ void run_by(const Matrix& m, const std::uint32_t* staged, int rows, int tile,
                                         int end, Done&& done) {
    constexpr int kPlaces = kRing / kRuns;
    constexpr int kApart = kRunsApart / 2 * kHalves;  // words
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, c = static_cast<int>(threadIdx.x) % 4;
    // Rows that there are not have somebody else's sums, which nobody takes.
    const int row = kHalves == 2 ? g : min(g, rows - 1);
    const unsigned start = shared_address(staged + row * Staged<kHalves>::stride(m.width) +
                                          (static_cast<int>(threadIdx.x) / 32 * 4 + c) * 4 * kHalves);
    int place = place_;
#pragma unroll 1
    for (; tile < end; ++tile) {
      unsigned x = start;
      float even[4] = {}, odd[4] = {};
#pragma unroll 1
      for (int i = batches_; i > 0; --i, x += kRuns * kApart * 4) {
        uint4 w[kRuns];
        wait_copies<kPlaces - 1>();
#pragma unroll
        for (int j = 0; j < kRuns; ++j)
          w[j] = load_in_turn(ring_address_ + static_cast<unsigned>(place + j * kLoad));
        uint4 xs[kRuns];
        if constexpr (kHalves == 1) {
#pragma unroll
          for (int j = 0; j < kRuns; ++j) xs[j] = load_in_turn(x + j * kApart * 4);
        }
#pragma unroll
        for (int j = 0; j < kRuns; ++j) {
          if constexpr (kHalves == 1) {
            const uint4 a = xs[j];
            mma(even, {a.x, a.y, a.z, a.w}, w[j].x, w[j].y);
            mma(odd, {a.x, a.y, a.z, a.w}, w[j].z, w[j].w);
          } else {
            const uint4 a = load_in_turn(x + j * kApart * 4);
            const uint4 b = load_in_turn(x + j * kApart * 4 + 16);
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
      if (left_ == 0 && after_ != nullptr) aim(after_, *after_matrix_);
    }
    place_ = place;
  }
  /// The places of the ring up to number `end`, in their order.
  __device__ __forceinline__ void fill(int end) {
    dispatch([&](auto n) {
      constexpr int kRuns = decltype(n)::value;
#pragma unroll 1
      for (; filled_ < end; ++filled_) load<kRuns>(filled_ * kRuns * kLoad);
    });
  }
  /// The loads' way through a matrix, from its beginning.
  __device__ __forceinline__ void aim(const __nv_bfloat16* data, const Matrix& m) {
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, c = static_cast<int>(threadIdx.x) % 4;
    const int runs = m.runs();
    batches_ = m.at_once == 1 ? runs : m.width / kRunsApart / m.at_once;
    after_ = nullptr;
    batch_ = batches_;
    left_ = m.tiles * batches_;
    const __nv_bfloat16* const column = data + static_cast<int>(threadIdx.x) / 32 * 32 + 8 * c;
    at_ = column + static_cast<std::int64_t>(m.row(m.first, g)) * m.width;
    // The last tile may have rows that there are not: their lanes go no further than the last one.
    last_ = column + static_cast<std::int64_t>(m.row(m.rows, g)) * m.width;
    next_tile_ = (m.half > 0 ? 4 : 8) * m.width - runs * kRunsApart;
  }
  /// The next runs into a place. Also where nothing is left: copies are waited for by their number.
  template <int kRuns>
  __device__ __forceinline__ void load(int place) {
    if (left_ > 0) {
#pragma unroll
      for (int j = 0; j < kRuns; ++j) {
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(
                         ring_address_ + static_cast<unsigned>(place + j * kLoad)),
                     "l"(at_ + j * kRunsApart)
                     : "memory");
      }
      --left_;
      at_ += kRuns * kRunsApart;
      if (--batch_ == 0) {
        batch_ = batches_;
        at_ += next_tile_;
        at_ = at_ < last_ ? at_ : last_;
      }
    }
    commit_copies();
  }

  unsigned ring_address_;
  int at_once_, places_;  // of the open matrix
  int place_ = 0;         // of the ring: what is multiplied next, in bytes
  int filled_ = 0;        // places of the ring that were asked for, or had nothing to ask for
  // The loads: batches of runs, of a tile, still to ask for in it, and in all tiles; where they are, in the
  // last row, and from behind a tile's last one to the next tile's first.
  int batches_, batch_, left_ = 0, next_tile_;
  const __nv_bfloat16 *at_, *last_;
  const __nv_bfloat16* after_ = nullptr;  // what is loaded behind this one
  const Matrix* after_matrix_;
};

}  // namespace fathom::cuda
