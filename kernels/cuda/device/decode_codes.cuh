// Products of a few rows by a matrix of codes of 4 bits (kernels/packed_matrix.h) that is read once:
// y[m][r] = sum over groups j of scale[r][j] * (sum over k in j of x[m][k] * code[r][k]).
//
// As decode_product.cuh has it for numbers: tiles of eight of the matrix's rows are dealt to the blocks of
// threads, of each a warp takes some runs of columns, and what the warps have is added up afterwards. But
// here the matrix is the tensor core's operand of sixteen rows (mma.cuh), those of two neighbouring tiles,
// and the rows x are the other one: a matrix of codes takes more instructions to make numbers of than to
// read, so that no product may have a half that nobody wants. A run has 128 columns: lane 4g+c holds the
// columns 32c .. 32c+31 of row g of both tiles, 16 bytes each.
//
// A word of eight codes becomes four words of two numbers, codes n and n+4. A half of a word that has a code
// in its lowest eight bits, and nothing else, is a number as it stands: below 2^-125 the numbers of bf16 are
// evenly spaced, so bits 0 .. 7 count multiples of 2^-133. One multiplication and addition makes code / 64 of
// it, exactly. So of two codes that lie side by side neither has to be moved. Rows x lie in shared memory in
// the order that this gives.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/decode_grid.cuh"
#include "kernels/cuda/device/decode_product.cuh"
#include "kernels/cuda/device/mma.cuh"

namespace fathom::cuda {

/// What one of a code is after pair_of_codes().
inline constexpr float kCodeUnit = 1.0F / 64;

/// Of a word's eight codes number n, of 0 and 1, and number n + 4, as a pair, times kCodeUnit. (Numbers 2 and
/// 3 are 0 and 1 of the word without its lowest eight bits.)
template <int kNumber>
__device__ __forceinline__ std::uint32_t pair_of_codes(std::uint32_t word) {
  // (word & mask) ^ sign, as one instruction: the compiler would make two of it. Two's complement with the
  // sign bit turned over is code + 8.
  constexpr std::uint32_t kMask = 0x000F000FU << (4 * kNumber), kSign = 0x00080008U << (4 * kNumber);
  std::uint32_t raised;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(raised) : "r"(word), "n"(kMask), "r"(kSign));
  // 2^-133 * 2^127, or 2^-129 * 2^123, is kCodeUnit; and 8 of these are taken off.
  constexpr std::uint32_t kGrow = kNumber == 0 ? 0x7F007F00U : 0x7D007D00U, kDown = 0xBE00BE00U;
  std::uint32_t pair;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(raised), "r"(kGrow), "r"(kDown));
  return pair;
}

/// Rows x in shared memory, as products with codes want them. Of eight columns from a multiple of eight the
/// words are (0, 4), (1, 5), (2, 6), (3, 7); four lanes' 16 bytes stand side by side.
struct StagedCodes {
  /// Words from a row to the next: 64 bytes beside a multiple of 128, as a run is four times 64, so that
  /// eight rows' 16 bytes come without conflicts. `width`: a multiple of kCodeRun.
  static __host__ __device__ __forceinline__ int stride(int width) { return width / 2 + 16; }
  static __host__ __device__ __forceinline__ int bytes(int width, int rows) {
    return stride(width) * rows * 4;
  }
  /// Where in a row the columns e .. e+7 are.
  static __device__ __forceinline__ int place(int e) {
    return e / kCodeRun * (kCodeRun / 2) + e / 8 % 4 * 16 + e / 32 % 4 * 4;
  }
  /// Two columns, e even.
  static __device__ __forceinline__ void put(std::uint32_t* staged, int stride, int row, int e,
                                             std::uint32_t word) {
    auto* const to = reinterpret_cast<std::uint16_t*>(staged + row * stride + place(e)) + e % 8 / 4;
    to[e % 4 * 2] = static_cast<std::uint16_t>(word);
    to[e % 4 * 2 + 2] = static_cast<std::uint16_t>(word >> 16);
  }
  /// Eight columns, e a multiple of eight.
  static __device__ __forceinline__ void put(std::uint32_t* staged, int stride, int row, int e, uint4 words) {
    *reinterpret_cast<uint4*>(staged + row * stride + place(e)) =
        uint4{__byte_perm(words.x, words.z, 0x5410), __byte_perm(words.x, words.z, 0x7632),
              __byte_perm(words.y, words.w, 0x5410), __byte_perm(words.y, words.w, 0x7632)};
  }
};

/// A matrix of codes: rows of width / 2 bytes, and its scales, a row's side by side.
struct DecodeCodes {
  const unsigned char* codes;
  const float* scales;
};

/// Scales of groups in shared memory, one a run: where several runs share one, it is there several times.
struct GroupScales {
  /// From a row's to the next's: odd, so that eight rows' come without conflicts.
  static __host__ __device__ __forceinline__ int stride(int width) { return width / kCodeRun | 1; }
  static __host__ __device__ __forceinline__ int bytes(int width, int tiles) {
    return (tiles + 1) / 2 * 16 * stride(width) * static_cast<int>(sizeof(float));
  }
};

/// A warp's share of a matrix of codes, on its way through the ring that WeightStream has for numbers: one of
/// the two is open at a time.
///
/// A place of the ring holds one run of two tiles, whatever the matrix, so that the loads may go on from one
/// matrix to the next: then(). An odd number of tiles leaves the upper half of the last places as it was; any
/// codes are numbers, and nobody takes their sums.
template <int kRing>
class CodeStream {
 public:
  static constexpr int kPlaces = kRing / 2;

  /// `ring`: WeightStream<kRing>::kBytes of shared memory, 16-aligned. `group`: columns that share a scale;
  /// 0: one scale a row, which whoever takes the sums multiplies. `scales`: twice `scale_bytes`, for groups.
  __device__ CodeStream(unsigned char* ring, int group, unsigned char* scales, int scale_bytes)
      : ring_address_(shared_address(ring) + threadIdx.x * 16),
        scale_address_(shared_address(scales)),
        scale_bytes_(scale_bytes),
        group_(group) {}

  /// The first loads begin. What was open before is given up. rest() before run().
  __device__ __forceinline__ void open(const DecodeCodes& w, const Matrix& m) {
    wait_copies<0>();
    place_ = into_ = ahead_ = 0;
    bring_scales(w, m);
    reading_ = written_;
    aim(w.codes, m);
    fill(left_ > kPlaces ? kPlaces / 2 : left_);
  }
  /// Behind the loads of the open matrix come those of another one, which is open when that has been
  /// multiplied. To be called before the multiplication, when what the last one had as scales has been read.
  __device__ __forceinline__ void then(const DecodeCodes& w, const Matrix& m) {
    bring_scales(w, m);
    after_ = w.codes;
    after_matrix_ = &m;
    if (left_ == 0) aim(after_, m);
  }
  /// Nothing is open any more: no register has to hold what was.
  __device__ __forceinline__ void close() {
    place_ = into_ = ahead_ = reading_ = written_ = runs_ = run_ = left_ = odd_ = next_tile_ = 0;
    at_ = after_ = nullptr;
    after_matrix_ = nullptr;
  }
  /// The rest of the ring.
  __device__ __forceinline__ void rest() {
    fill(kPlaces);
    // Copies are waited for by their number.
    for (int i = ahead_; i < kPlaces; ++i) commit_copies();
  }

  /// The open matrix times the staged rows x; done(tile, sums) gets this warp's share of the sums, for
  /// h < kHalves and a lane 4g+c: sums[h][0], sums[h][1] are those of the tile's row g with the rows 8h+2c
  /// and 8h+2c+1 of x, sums[h][2] and sums[h][3] of row g of the next tile, which may be none of this
  /// block's. All threads call it.
  template <int kHalves, typename Done>
  __device__ __forceinline__ void run(const Matrix& m, const std::uint32_t* staged, int rows, Done&& done) {
    if (has_groups(m)) {
      run_by<kHalves, true>(m, staged, rows, done);
    } else {
      run_by<kHalves, false>(m, staged, rows, done);
    }
  }

 private:
  static constexpr int kLoad = kRingLoad;
  static constexpr int kPlace = 2 * kLoad;
  static constexpr int kRunBytes = kCodeRun / 2;

  static __device__ __forceinline__ float load_scale(unsigned address) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
    return v;
  }
  __device__ __forceinline__ bool has_groups(const Matrix& m) const { return group_ > 0 && group_ < m.width; }
  /// Of this warp, in a tile.
  static __device__ __forceinline__ int runs_of(const Matrix& m) {
    return (m.width / kCodeRun - static_cast<int>(threadIdx.x) / 32 + kDecodeWarps - 1) / kDecodeWarps;
  }
  static __device__ __forceinline__ int next_place(int place) {
    return place == (kPlaces - 1) * kPlace ? 0 : place + kPlace;
  }

  template <int kHalves, bool kGroups, typename Done>
  __device__ __forceinline__ void run_by(const Matrix& m, const std::uint32_t* staged, int rows,
                                         Done&& done) {
    constexpr unsigned kApart = kDecodeWarps * kCodeRun * 2;  // bytes of a row x
    const int warp = static_cast<int>(threadIdx.x) / 32, g = static_cast<int>(threadIdx.x) % 32 / 4,
              c = static_cast<int>(threadIdx.x) % 4, runs = runs_of(m);
    // Rows that there are not have somebody else's sums, which nobody takes.
    unsigned start[kHalves];
#pragma unroll
    for (int h = 0; h < kHalves; ++h)
      start[h] = shared_address(staged + min(g + 8 * h, rows - 1) * StagedCodes::stride(m.width) +
                                warp * (kCodeRun / 2) + c * 4);
    const unsigned scale_row = GroupScales::stride(m.width) * static_cast<unsigned>(sizeof(float));
    if constexpr (kGroups) wait_for_scales(runs);
#pragma unroll 1
    for (int tile = 0; tile < m.tiles; tile += 2) {
      unsigned x = 0;
      unsigned scale = 0;
      if constexpr (kGroups) scale = scale_address_ + reading_ + (tile * 8 + g) * scale_row + warp * 4;
      float sums[kHalves][4] = {}, more[kHalves][4] = {};  // of every second product
#pragma unroll 1
      for (int i = runs; i > 0; --i, x += kApart) {
        wait_copies<kPlaces - 1>();
        const uint4 low = load_in_turn(ring_address_ + static_cast<unsigned>(place_));
        const uint4 high = load_in_turn(ring_address_ + static_cast<unsigned>(place_ + kLoad));
        const std::uint32_t lows[4] = {low.x, low.y, low.z, low.w},
                            highs[4] = {high.x, high.y, high.z, high.w};
        if constexpr (kGroups) {
          float even[kHalves][4] = {}, odd[kHalves][4] = {};
          const float s = load_scale(scale), t = load_scale(scale + 8 * scale_row);
          multiply<kHalves>(even, odd, lows, highs, start, x);
#pragma unroll
          for (int h = 0; h < kHalves; ++h) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[h][e] = fmaf(e < 2 ? s : t, even[h][e] + odd[h][e], sums[h][e]);
          }
          scale += kDecodeWarps * static_cast<unsigned>(sizeof(float));
        } else {
          multiply<kHalves>(sums, more, lows, highs, start, x);
        }
        load();
        place_ = next_place(place_);
      }
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[h][e] = (sums[h][e] + more[h][e]) / kCodeUnit;
      }
      done(tile, sums);
    }
    ahead_ -= (m.tiles + 1) / 2 * runs;
    reading_ = scale_bytes_ - reading_;
  }
  /// A run of two tiles, times that of x.
  template <int kHalves>
  static __device__ __forceinline__ void multiply(float (&even)[kHalves][4], float (&odd)[kHalves][4],
                                                  const std::uint32_t (&lows)[4],
                                                  const std::uint32_t (&highs)[4],
                                                  const unsigned (&start)[kHalves], unsigned x) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint4 xs[kHalves];
#pragma unroll
      for (int h = 0; h < kHalves; ++h) xs[h] = load_in_turn(start[h] + x + i * 64);
      const std::uint32_t a[4] = {pair_of_codes<0>(lows[i]), pair_of_codes<0>(highs[i]),
                                  pair_of_codes<1>(lows[i]), pair_of_codes<1>(highs[i])};
      const std::uint32_t low = lows[i] >> 8, high = highs[i] >> 8;
      const std::uint32_t b[4] = {pair_of_codes<0>(low), pair_of_codes<0>(high), pair_of_codes<1>(low),
                                  pair_of_codes<1>(high)};
#pragma unroll
      for (int h = 0; h < kHalves; ++h) {
        mma(even[h], a, xs[h].x, xs[h].y);
        mma(odd[h], b, xs[h].z, xs[h].w);
      }
    }
  }

  /// The loads' way through a matrix, from its beginning.
  __device__ __forceinline__ void aim(const unsigned char* codes, const Matrix& m) {
    const int warp = static_cast<int>(threadIdx.x) / 32, g = static_cast<int>(threadIdx.x) % 32 / 4,
              c = static_cast<int>(threadIdx.x) % 4;
    const int row_bytes = m.width / 2, tile_rows = m.half > 0 ? 4 : 8;
    after_ = nullptr;
    runs_ = run_ = runs_of(m);
    left_ = (m.tiles + 1) / 2 * runs_;
    odd_ = m.tiles % 2 * runs_;
    at_ = codes + static_cast<std::int64_t>(m.row(m.first, g)) * row_bytes + warp * kRunBytes + c * 16;
    next_tile_ = tile_rows * row_bytes;
  }
  __device__ __forceinline__ void fill(int end) {
#pragma unroll 1
    while (ahead_ < end && left_ > 0) load();
  }
  /// The next run into the ring. Also where nothing is left: copies are waited for by their number.
  __device__ __forceinline__ void load() {
    if (left_ > 0) {
      const unsigned to = ring_address_ + static_cast<unsigned>(into_);
      copy_16(to, at_);
      if (left_ > odd_) copy_16(to + kLoad, at_ + next_tile_);
      into_ = next_place(into_);
      ++ahead_;
      --left_;
      at_ += kDecodeWarps * kRunBytes;
      if (--run_ == 0) {
        run_ = runs_;
        at_ += 2 * next_tile_ - runs_ * kDecodeWarps * kRunBytes;
        if (left_ == 0 && after_ != nullptr) aim(after_, *after_matrix_);
      }
    }
    commit_copies();
  }
  static __device__ __forceinline__ void copy_16(unsigned to, const unsigned char* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;\n" ::"r"(to), "l"(from) : "memory");
  }

  // --- scales of groups: those of two matrices, of which one is multiplied
  /// All threads together. They come with the next load that is asked for.
  __device__ __forceinline__ void bring_scales(const DecodeCodes& w, const Matrix& m) {
    written_ = scale_bytes_ - written_;
    if (!has_groups(m)) return;
    const int runs = m.width / kCodeRun, groups = m.width / group_, runs_of_group = group_ / kCodeRun;
    const unsigned row_bytes = GroupScales::stride(m.width) * static_cast<unsigned>(sizeof(float));
#pragma unroll 1
    for (int run = static_cast<int>(threadIdx.x) % 32; run < runs; run += 32) {
      const float* const from = w.scales + run / runs_of_group;
      const unsigned to = scale_address_ + written_ + run * static_cast<unsigned>(sizeof(float));
#pragma unroll 1
      for (int row = static_cast<int>(threadIdx.x) / 32; row < 8 * m.tiles; row += kDecodeWarps) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;\n" ::"r"(to + row * row_bytes),
                     "l"(from + static_cast<std::int64_t>(m.row(m.first + row / 8, row % 8)) * groups)
                     : "memory");
      }
    }
  }
  /// Until all threads' have come: with the open matrix's first load. A warp without any waits for all it
  /// has.
  __device__ __forceinline__ void wait_for_scales(int runs) {
    if (runs > 0) {
      wait_copies<kPlaces - 1>();
    } else {
      commit_copies();
      wait_copies<0>();
    }
    sync_workers();
  }

  unsigned ring_address_, scale_address_;
  int scale_bytes_, group_;
  int place_ = 0, into_ = 0;  // of the ring: what is multiplied next, and what is filled next, in bytes
  int ahead_ = 0;             // places that were filled, and not multiplied
  int reading_ = 0,
      written_ = 0;  // of the two rooms for scales: of the open matrix, and the last one brought
  // The loads: runs of a tile, still to ask for in it, and in all tiles; so many at the end have no second
  // tile; where they are in the first tile's row, and from there to the next tile's.
  int runs_, run_, left_ = 0, odd_, next_tile_;
  const unsigned char* at_;
  const unsigned char* after_ = nullptr;  // what is loaded behind this one
  const Matrix* after_matrix_;
};

}  // namespace fathom::cuda
