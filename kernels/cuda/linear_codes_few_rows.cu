// y = x W^T of codes where x has few rows: what costs is reading W, so a warp brings its part of W's rows
// straight to registers, several loads ahead of the tensor cores (mma m16n8k32 of 8-bit integers, sm_80). The
// warps of a block share the columns, and add their sums in shared memory: of integers, any order gives the
// same.
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/vector.cuh"
#include "kernels/cuda/linear_codes.h"

namespace fathom::cuda {

namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kColumns = 64;  // of a warp at a time; rows are whole runs of them, with zeros at the end

/// 16 rows of x and 8 of W in mma's C; what a lane holds of them is in mma.cuh.
constexpr int kTileRows = 16, kTileOuts = 8;

/// In which order the columns go through a product does not matter as long as x and W agree: lane 4 * g + c
/// takes the columns 16 * c .. 16 * c + 15 of rows g of both, which are neighbours in memory. They make two
/// products of 32 columns, in each of which a lane has two words of four codes a row.
struct XTile {
  uint4 upper, lower;  // rows g and g + 8
};

/// Of 4 bits the codes of a word's odd columns and those of its even ones are a word each, in the upper half
/// of a byte: 16 times the code, sign and all.
template <int kBits>
struct WTile;
template <>
struct WTile<8> {
  uint4 codes;
  __device__ __forceinline__ void load(const std::uint8_t* w, int row, int column) {
    codes = *reinterpret_cast<const uint4*>(w + (row + column));
  }
  __device__ __forceinline__ void clear() { codes = uint4{0, 0, 0, 0}; }
  __device__ __forceinline__ void words(int product, std::uint32_t (&b)[2]) const {
    b[0] = product == 0 ? codes.x : codes.z;
    b[1] = product == 0 ? codes.y : codes.w;
  }
};
template <>
struct WTile<4> {
  uint2 codes;
  __device__ __forceinline__ void load(const std::uint8_t* w, int row, int column) {
    codes = *reinterpret_cast<const uint2*>(w + (row + column / 2));
  }
  __device__ __forceinline__ void clear() { codes = uint2{0, 0}; }
  __device__ __forceinline__ void words(int product, std::uint32_t (&b)[2]) const {
    const std::uint32_t word = product == 0 ? codes.x : codes.y;
    b[0] = word << 4 & 0xf0f0f0f0U;
    b[1] = word & 0xf0f0f0f0U;
  }
};

/// The two words of a row of x that meet W's.
template <int kBits>
__device__ __forceinline__ void words_of_x(const uint4& codes, int product, std::uint32_t& first,
                                           std::uint32_t& second) {
  const std::uint32_t low = product == 0 ? codes.x : codes.z, high = product == 0 ? codes.y : codes.w;
  if constexpr (kBits == 8) {
    first = low, second = high;
  } else {
    first = __byte_perm(low, high, 0x6420);
    second = __byte_perm(low, high, 0x7531);
  }
}

__device__ __forceinline__ void mma_codes(int (&c)[4], const std::uint32_t (&a)[4],
                                          const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// A block's part of the operands: below 2^31 bytes, so that an int finds its way in it.
struct Block {
  const std::uint8_t *x, *w;
  int x_bytes, w_bytes;  // of a row
  int rows, outs;
};

/// What a warp reads at once: tiles of x and of W, 64 columns wide.
template <int kBits, int kRowTiles, int kOutTiles>
struct Stage {
  XTile x[kRowTiles];
  WTile<kBits> w[kOutTiles];

  /// Rows and outs that are not there are zeros, and so is all behind the last column.
  __device__ __forceinline__ void load(const Block& of, int column, int lane) {
    const int g = lane / 4, from = column + 16 * (lane % 4);
    const bool inside = column < of.x_bytes;
    const auto of_x = [&](int row) {
      return inside && row < of.rows ? *reinterpret_cast<const uint4*>(of.x + (row * of.x_bytes + from))
                                     : uint4{0, 0, 0, 0};
    };
#pragma unroll
    for (int i = 0; i < kOutTiles; ++i) {
      const int out = i * kTileOuts + g;
      if (inside && out < of.outs) {
        w[i].load(of.w, out * of.w_bytes, from);
      } else {
        w[i].clear();
      }
    }
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      x[i].upper = of_x(i * kTileRows + g);
      x[i].lower = of_x(i * kTileRows + g + 8);
    }
  }

  __device__ __forceinline__ void multiply(int (&sums)[kRowTiles][kOutTiles][4]) const {
#pragma unroll
    for (int product = 0; product < 2; ++product) {
      std::uint32_t b[kOutTiles][2];
#pragma unroll
      for (int i = 0; i < kOutTiles; ++i) w[i].words(product, b[i]);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        std::uint32_t a[4];
        words_of_x<kBits>(x[r].upper, product, a[0], a[2]);
        words_of_x<kBits>(x[r].lower, product, a[1], a[3]);
#pragma unroll
        for (int i = 0; i < kOutTiles; ++i) mma_codes(sums[r][i], a, b[i]);
      }
    }
  }
};

/// blockIdx.x: so many tiles of outs; y: so many tiles of rows; z: the product of a batch.
template <typename T, int kBits, int kRowTiles, int kOutTiles, int kAhead>
__global__ void __launch_bounds__(kThreads) few_rows_kernel(CodesOperands<T> a) {
  constexpr int kRows = kRowTiles * kTileRows, kOuts = kOutTiles * kTileOuts;
  constexpr int kPitch = kOuts + 4;  // so that lanes meet in pairs at a bank, and no more
  __shared__ int totals[kRows * kPitch];
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kPitch; i += kThreads) totals[i] = 0;
  __syncthreads();

  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t e = blockIdx.z, row0 = std::int64_t{blockIdx.y} * kRows,
                     out0 = std::int64_t{blockIdx.x} * kOuts;
  const int rows = static_cast<int>(a.rows - row0 < kRows ? a.rows - row0 : kRows);
  const int outs = static_cast<int>(a.out - out0 < kOuts ? a.out - out0 : kOuts);
  const Block block{a.x + (e * a.rows + row0) * a.x_bytes,
                    a.w + (e * a.out + out0) * a.w_bytes,
                    static_cast<int>(a.x_bytes),
                    static_cast<int>(a.w_bytes),
                    rows,
                    outs};

  constexpr int kStep = kWarps * kColumns;  // from a warp's columns to its next
  int sums[kRowTiles][kOutTiles][4] = {};
  Stage<kBits, kRowTiles, kOutTiles> stages[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) stages[i].load(block, warp * kColumns + i * kStep, lane);
  for (int column = warp * kColumns; column < block.x_bytes; column += kAhead * kStep) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      stages[i].multiply(sums);
      stages[i].load(block, column + (i + kAhead) * kStep, lane);
    }
  }

  const int g = lane / 4, c = lane % 4;
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < kOutTiles; ++i) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const int row = r * kTileRows + g + n / 2 * 8, out = i * kTileOuts + 2 * c + n % 2;
        atomicAdd(&totals[row * kPitch + out], sums[r][i][n]);
      }
    }
  }
  __syncthreads();

  for (int i = static_cast<int>(threadIdx.x); i < rows * kOuts; i += kThreads) {
    const int row = i / kOuts, out = i % kOuts;
    if (out >= outs) continue;
    const int total = totals[row * kPitch + out];
    const auto sum = static_cast<float>(kBits == 8 ? total : total / 16);  // a multiple of 16
    // As a sum over groups that begins with zero.
    const float scaled = fmaf(sum, a.w_scales[e * a.out + out0 + out], 0.0F);
    a.y[(e * a.rows + row0 + row) * a.out + out0 + out] =
        from_float<T>(scaled * a.x_scales[e * a.rows + row0 + row]);
  }
}

template <typename T, int kBits, int kRowTiles, int kOutTiles, int kAhead>
void launch_few_rows(const CodesOperands<T>& a, cudaStream_t stream) {
  const dim3 blocks(blocks_for(a.out, kOutTiles * kTileOuts), blocks_for(a.rows, kRowTiles * kTileRows),
                    static_cast<unsigned>(a.batch));
  few_rows_kernel<T, kBits, kRowTiles, kOutTiles, kAhead><<<blocks, kThreads, 0, stream>>>(a);
}

template <typename T, int kBits>
void run(const CodesOperands<T>& a, int multiprocessors, cudaStream_t stream) {
  // A block reads all of its rows of x: for 32 outs at once, if that gives work to half of the device.
  const std::int64_t wide_blocks =
      a.batch * blocks_for(a.rows, 4 * kTileRows) * blocks_for(a.out, 4 * kTileOuts);
  const bool narrow = 2 * wide_blocks < multiprocessors;
  if (a.rows <= kTileRows) {
    if (narrow) {
      launch_few_rows<T, kBits, 1, 1, 4>(a, stream);
    } else {
      launch_few_rows<T, kBits, 1, 4, kBits == 8 ? 3 : 4>(a, stream);
    }
  } else if (narrow) {
    launch_few_rows<T, kBits, 4, 1, 2>(a, stream);
  } else {
    launch_few_rows<T, kBits, 4, 4, 2>(a, stream);
  }
  check_launch("linear_codes_forward");
}

}  // namespace

template <typename T>
void codes_of_few_rows(const CodesOperands<T>& a, int multiprocessors, cudaStream_t stream) {
  if (a.bits == 4) {
    run<T, 4>(a, multiprocessors, stream);
  } else {
    run<T, 8>(a, multiprocessors, stream);
  }
}

template void codes_of_few_rows(const CodesOperands<float>&, int, cudaStream_t);
template void codes_of_few_rows(const CodesOperands<bf16>&, int, cudaStream_t);

}  // namespace fathom::cuda
