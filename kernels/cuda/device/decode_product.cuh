// Products of a few rows by a matrix of weights that is read once: y[m][r] = sum over k of x[m][k] * w[r][k].
//
// Tiles of eight of the matrix's rows are dealt to the blocks of threads in order. Of each tile a warp takes
// some columns, and what the warps have is added up afterwards: by units of 512 bytes, 16 of each lane, which
// are one operand of two of the tensor core's m16n8k16 (mma.cuh), with the rows x as the other one. Which
// column stands for which k does not matter to a sum, as long as both operands agree. A lane's 16 bytes are
// the words p, q, r, s.
//
// Up to eight rows, a unit is 64 columns of four of the tile's rows, a quad: whole lines of 128 bytes, since
// a load of eight halves of lines takes twice as long to come and to be written to shared memory. Lane 4g+c
// has of the quad's row g / 2 the columns 8c .. 8c+7 of the first 32 for even g, of the others for odd g. So
// the operand's eight columns are four rows twice. Rows x are there twice as well: row g of the operand has
// of row g the first 32 columns, row g + 8 the others. Of the result, lane 4g+c finds row g's sum with the
// quad's row c in two of its elements, and what the other two have is a product of columns that do not
// belong to each other.
//
// Up to sixteen rows, a unit is 32 columns of all eight rows. Lane 4g+c has the columns 8c .. 8c+7 of row g;
// rows x are row g and row g + 8 of the operand.
//
// Rows x lie in shared memory as the tensor core wants them, so that no register has to be moved.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/mma.cuh"

namespace fathom::cuda {

/// Columns of a unit. kHalves: 1 for up to eight rows x, 2 for up to sixteen.
template <int kHalves>
inline constexpr int kUnitColumns = kHalves == 1 ? 64 : 32;

/// The shape of a matrix, and what of it is this block's. The same in all layers, so it is worked out once.
struct Matrix {
  int rows, width;  // width: a multiple of 32, at least 256
  int half;  // not 0: a tile has four rows of the first half and the four that belong to them of the second
  int first, tiles;  // of this block
  int parts;         // that a row is cut into: one a warp, or half as many and each quad has its own warps
  int units;         // of a part, at the most
  int at_once;       // units that are taken at once: divides those of each warp
  int batches;       // so many times as many a whole part has, of a tile or of a quad
  int places;        // and the ring

  /// `ring`: units that a warp's ring holds.
  template <int kHalves>
  __device__ void deal(int matrix_rows, int matrix_width, int matrix_half, int ring) {
    rows = matrix_rows, width = matrix_width, half = matrix_half;
    const long long all = half > 0 ? (half + 3) / 4 : (rows + 7) / 8;
    first = static_cast<int>(all * blockIdx.x / gridDim.x);
    tiles = static_cast<int>(all * (blockIdx.x + 1) / gridDim.x) - first;
    constexpr int kColumns = kUnitColumns<kHalves>, kHalf = kDecodeWarps / 2;
    const int row_units = (width + kColumns - 1) / kColumns;
    const bool whole = width % kColumns == 0;
    const bool by_quads = kHalves == 1 && whole && row_units % kDecodeWarps != 0 && row_units % kHalf == 0;
    parts = by_quads ? kHalf : kDecodeWarps;
    units = (row_units + parts - 1) / parts;
    at_once = 1;
    for (const int n : {3, 4, 8, 11}) {
      const int each = kHalves == 1 && n % 2 == 0 ? n / 2 : n;  // an even number: of both quads
      if (whole && row_units % parts == 0 && units % each == 0 && ring >= 2 * n) at_once = n;
    }
    batches = (kHalves == 1 && at_once % 2 == 0 ? 2 * units : units) / at_once;
    places = ring / at_once;
  }
  /// Row g of a tile; past the end the last one, whose result nobody takes.
  __device__ __forceinline__ int row(int tile, int g) const {
    if (half == 0) return min(tile * 8 + g, rows - 1);
    return min(tile * 4 + g % 4, half - 1) + (g < 4 ? 0 : half);
  }
  /// Whether a ring that goes round is always at the beginning of a tile.
  template <int kHalves>
  __device__ __forceinline__ bool places_are_whole_tiles() const {
    const bool by_quad = kHalves == 1 && at_once % 2 != 0 && parts == kDecodeWarps;
    return width % (parts * kUnitColumns<kHalves>) == 0 && places % (by_quad ? 2 * batches : batches) == 0;
  }
  /// The number of a warp's part of the columns, and its units.
  __device__ __forceinline__ int part() const { return static_cast<int>(threadIdx.x) / 32 & (parts - 1); }
  /// Where each quad has its own warps: this one's.
  __device__ __forceinline__ int quad() const {
    return parts < kDecodeWarps ? static_cast<int>(threadIdx.x) / 32 / (kDecodeWarps / 2) : 0;
  }
  template <int kHalves>
  __device__ __forceinline__ int units_of_warp() const {
    const int all = (width + kUnitColumns<kHalves> - 1) / kUnitColumns<kHalves>;
    return max(0, min(units, all - part() * units));
  }
};

/// Rows x in shared memory.
template <int kHalves>
struct Staged {
  /// Words from a row (or a pair of rows) to the next, so that eight rows' 16 bytes come without conflicts:
  /// 16 bytes beside a multiple of 32, or 64 beside a multiple of 128.
  static __host__ __device__ __forceinline__ int stride(int width) {
    if (kHalves == 1) return (width + 63) / 64 * 32 + 4;
    return width % 32 == 0 ? width + 16 : width;
  }
  static __host__ __device__ __forceinline__ int bytes(int width, int rows) {
    return stride(width) * (kHalves == 1 ? rows : 8) * 4;
  }
  /// Where in a row the columns e .. e+7 begin, e a multiple of eight; each two of them are two words on.
  static __device__ __forceinline__ int place(int e) {
    return kHalves == 1 ? e / 64 * 32 + e % 32 / 8 * 8 + e % 64 / 32 : e;
  }
  /// Two columns, e even.
  static __device__ __forceinline__ void put(std::uint32_t* staged, int stride, int row, int e,
                                             std::uint32_t word) {
    staged[row % 8 * stride + place(e / 8 * 8) + e % 8 + row / 8] = word;
  }
  /// Eight columns, e a multiple of eight.
  static __device__ __forceinline__ void put(std::uint32_t* staged, int stride, int row, int e, uint4 words) {
    std::uint32_t* const to = staged + row % 8 * stride + place(e) + row / 8;
    to[0] = words.x, to[2] = words.y, to[4] = words.z, to[6] = words.w;
  }
  /// Columns that a row's last unit has and the row has not: zeros. By `threads` threads.
  static __device__ __forceinline__ void pad(std::uint32_t* staged, int width, int rows, int thread,
                                             int threads) {
    if constexpr (kHalves == 1) {
      if (width % 64 == 0) return;
      for (int i = thread; i < rows * 16; i += threads)
        put(staged, stride(width), i / 16, width + i % 16 * 2, 0U);
    }
  }
};

/// A warp's share of a matrix, on its way through a ring of its own in shared memory: kRing loads ahead of
/// what is computed. Opened before x is there, since weights wait for nothing. A lane reads what it loaded
/// itself, so nobody waits for anybody.
///
/// A few warps with much to do each: what counts is how many instructions follow one another. So units are
/// taken several at a time, as many as divide a tile's, in loops that are short and whose addresses are a
/// register and a constant: a step passes through its code once a phase, and code that the caches of
/// instructions do not hold costs more than it computes.
///
/// Loads that are asked for come in turn: what else is read waits for them. So open() asks for half of a ring
/// where a matrix fills more than one, and rest(), when the rows x are there, for the other half.
template <int kRing, int kHalves>
class WeightStream {
 public:
  static constexpr int kLoad = kDecodeThreads * 16;
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
    at_once_ = places_ = place_ = filled_ = batches_ = batch_ = left_ = next_ = next_sum_ = back_ = 0;
    at_ = at_other_ = last_ = after_ = nullptr;
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

  /// The next `tiles` tiles of the open matrix times the staged rows x: the warps' shares of the sums, into
  /// `sums`: [tiles][parts][rows][8].
  __device__ __forceinline__ void run(const Matrix& m, const std::uint32_t* staged, int rows, int tiles,
                                      float* sums) {
    dispatch([&](auto n) { run_by<decltype(n)::value>(m, staged, rows, tiles, sums); });
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
  /// An even number of units is as many of one quad as of the other, in turn.
  template <int kUnits>
  static constexpr bool kBoth = kHalves == 1 && kUnits % 2 == 0;
  static constexpr int kColumns = kUnitColumns<kHalves>;

  template <int kUnits>
  __device__ __forceinline__ void run_by(const Matrix& m, const std::uint32_t* staged, int rows, int tiles,
                                         float* sums) {
    constexpr int kPlaces = kRing / kUnits;
    constexpr int kRowUnits = kBoth<kUnits> ? kUnits / 2 : kUnits;
    constexpr int kUnitBytes = kColumns * kHalves * 2;  // of rows x
    const int g = static_cast<int>(threadIdx.x) % 32 / 4, c = static_cast<int>(threadIdx.x) % 4;
    const unsigned start = shared_address(staged + g * Staged<kHalves>::stride(m.width) + c * 8) +
                           static_cast<unsigned>(m.part() * m.units * kUnitBytes);
    // One operand for all tiles where a row's units are all taken at once. Rows that there are not have
    // zeros: what is read of shared memory is waited for, lane by lane.
    const bool has_row = kHalves == 2 || g < rows;
    uint4 xs[kHalves == 1 ? kRowUnits : 1][2] = {};
    const auto load_rows = [&](unsigned x) {
      if constexpr (kHalves == 1) {
        if (!has_row) return;
#pragma unroll
        for (int j = 0; j < kRowUnits; ++j) {
          xs[j][0] = load_in_turn(x + j * kUnitBytes);
          xs[j][1] = load_in_turn(x + j * kUnitBytes + 16);
        }
      }
    };
    load_rows(start);
    // Of a tile a warp has one quad after the other, both at once, or one of them.
    const bool by_quad = kHalves == 1 && !kBoth<kUnits> && m.parts == kDecodeWarps;
    float* to = sums + (m.part() * rows + g) * 8 + (kHalves == 1 ? c + 4 * m.quad() : 2 * c);
    const int next_tile = m.parts * rows * 8;
    int place = place_;
#pragma unroll 1
    for (; tiles > 0; --tiles, to += next_tile) {
#pragma unroll 1
      for (int quad = 0; quad <= (by_quad ? 1 : 0); ++quad) {
        unsigned x = start;
        float low[2][4] = {}, high[2][4] = {};  // of every second unit: so many products under way at once
#pragma unroll 1
        for (int i = batches_; i > 0; --i) {
          uint4 w[kUnits];
          wait_copies<kPlaces - 1>();
#pragma unroll
          for (int j = 0; j < kUnits; ++j)
            w[j] = load_in_turn(ring_address_ + static_cast<unsigned>(place + j * kLoad));
#pragma unroll
          for (int j = 0; j < kUnits; ++j) {
            uint4 a, b;
            if constexpr (kHalves == 1) {
              a = xs[kBoth<kUnits> ? j / 2 : j][0];
              b = xs[kBoth<kUnits> ? j / 2 : j][1];
            } else {
              a = load_in_turn(x + j * kUnitBytes);
              b = load_in_turn(x + j * kUnitBytes + 16);
            }
            mma(low[j % 2], {a.x, a.y, a.z, a.w}, w[j].x, w[j].y);
            mma(high[j % 2], {b.x, b.y, b.z, b.w}, w[j].z, w[j].w);
          }
          x = i == 1 ? start : x + kRowUnits * kUnitBytes;
          if (batches_ > 1) load_rows(x);
          load<kUnits>(place);
          place = place == (kPlaces - 1) * kUnits * kLoad ? 0 : place + kUnits * kLoad;
        }
        if constexpr (kHalves == 1) {
          float sum[2];
#pragma unroll
          for (int h = 0; h < 2; ++h) sum[h] = (low[h][0] + high[h][0]) + (low[h][3] + high[h][3]);
          if (has_row) {
            if constexpr (kBoth<kUnits>) {
              to[0] = sum[0], to[4] = sum[1];
            } else {
              to[4 * quad] = sum[0] + sum[1];
            }
          }
        } else {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (g + e / 2 * 8 < rows)
              to[e / 2 * 64 + e % 2] = (low[0][e] + high[0][e]) + (low[1][e] + high[1][e]);
          }
        }
      }
      if (left_ == 0 && after_ != nullptr) aim(after_, *after_matrix_);
    }
    place_ = place;
  }
  /// The places of the ring up to number `end`, in their order.
  __device__ __forceinline__ void fill(int end) {
    dispatch([&](auto n) {
      constexpr int kUnits = decltype(n)::value;
#pragma unroll 1
      for (; filled_ < end; ++filled_) load<kUnits>(filled_ * kUnits * kLoad);
    });
  }
  /// The loads' way through a matrix, from its beginning.
  __device__ __forceinline__ void aim(const __nv_bfloat16* data, const Matrix& m) {
    constexpr int kLanes = kColumns / 8;  // that share a row
    const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / kLanes;
    const int units = m.template units_of_warp<kHalves>();
    const bool both = kHalves == 1 && m.at_once % 2 == 0, own = m.parts < kDecodeWarps;
    const int passes = kHalves == 1 && !both && !own ? 2 : 1;
    const int tile_size = (m.half > 0 ? 4 : 8) * m.width, quad_size = max(m.half, 4) * m.width;
    batches_ = m.at_once == 1 ? units : m.batches;
    after_ = nullptr;
    batch_ = batches_;
    left_ = m.tiles * passes * batches_;
    const __nv_bfloat16* const column = data + m.part() * m.units * kColumns + lane % kLanes * 8;
    at_ = column + static_cast<std::int64_t>(m.row(m.first, 4 * m.quad() + row)) * m.width;
    // The last tile may have rows that there are not: their lanes go no further than the last one.
    last_ = column + static_cast<std::int64_t>(m.rows - 1) * m.width;
    at_other_ = column + static_cast<std::int64_t>(m.row(m.first, (4 + row) % 8)) * m.width;
    next_ = (passes == 2 ? quad_size : tile_size) - units * kColumns;
    next_sum_ = passes == 2 ? tile_size - 2 * units * kColumns : 2 * next_;
    // A row's last unit may have half of its columns: the lanes of the other half read these too.
    const int all = (m.width + kColumns - 1) / kColumns;
    const bool has_last = m.part() * m.units + units == all && units > 0;
    back_ = has_last && lane % kLanes * 8 >= m.width - (all - 1) * kColumns ? 32 : 0;
  }
  /// The next units into a place. Also where nothing is left: copies are waited for by their number.
  template <int kUnits>
  __device__ __forceinline__ void load(int place) {
    if (left_ > 0) {
      const __nv_bfloat16* from = at_;
      if constexpr (kHalves == 1 && kUnits == 1) from -= batch_ == 1 ? back_ : 0;
#pragma unroll
      for (int j = 0; j < kUnits; ++j) {
        const __nv_bfloat16* const unit =
            kBoth<kUnits> ? (j % 2 == 0 ? at_ : at_other_) + j / 2 * kColumns : from + j * kColumns;
        asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(
                         ring_address_ + static_cast<unsigned>(place + j * kLoad)),
                     "l"(unit)
                     : "memory");
      }
      --left_;
      at_ += (kBoth<kUnits> ? kUnits / 2 : kUnits) * kColumns;
      if constexpr (kBoth<kUnits>) at_other_ += kUnits / 2 * kColumns;
      if (--batch_ == 0) {
        batch_ = batches_;
        at_ += next_;
        at_ = at_ < last_ ? at_ : last_;
        if constexpr (kBoth<kUnits>) {
          at_other_ += next_;
          at_other_ = at_other_ < last_ ? at_other_ : last_;
        } else {
          next_ = next_sum_ - next_;
        }
      }
    }
    commit_copies();
  }

  unsigned ring_address_;
  int at_once_, places_;  // of the open matrix
  int place_ = 0;         // of the ring: what is multiplied next, in bytes
  int filled_ = 0;        // places of the ring that were asked for, or had nothing to ask for
  // The loads: batches of units, of a tile or a quad, still to ask for in it, and in all of them; where they
  // are, where both quads are taken at once also in the second one, and in the last row; from behind the last
  // one of a tile or quad to the next one's first, which the next time is this less than the sum.
  int batches_, batch_, left_ = 0, next_, next_sum_, back_;
  const __nv_bfloat16 *at_, *at_other_, *last_;
  const __nv_bfloat16* after_ = nullptr;  // what is loaded behind this one
  const Matrix* after_matrix_;
};

}  // namespace fathom::cuda
