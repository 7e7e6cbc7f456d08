// Hadamard transforms of bf16 rows on tensor cores (device/hadamard_signs.cuh) whose lines have 128 columns:
// a warp has whole ones. Their results are stored, or become codes of few bits in the same pass
// (row_codes.h), for which what goes in may be the SwiGLU of a gate and an up.
//
// A thread block goes through rows, all of whose lines it has in shared memory; each of its warps
// computes 16 of them. Rows come while those before are computed; gates and ups, which take the room of two,
// as soon as theirs are used. Of M = 44 a row's instructions take as long as memory does, so that many warps
// and few instructions are what counts.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/device/hadamard_signs.cuh"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/raw_pack.cuh"
#include "kernels/cuda/device/row_codes.cuh"
#include "kernels/cuda/device/sigmoid.cuh"
#include "kernels/cuda/hadamard.h"
#include "kernels/cuda/row_codes.h"

namespace fathom::cuda {

namespace {

constexpr int kColumns = 8 * kSignTiles;
constexpr int kPacks = kColumns / 8;  // of a line
constexpr int kLine = kPacks + 1;     // from a line to the next in shared memory: in different banks
constexpr int kFewWarps = 3;          // of most transforms' thread blocks

enum class Rows : std::uint8_t { Stored, Coded, CodedSwiglu };

struct Arguments {
  SignsShape shape;
  bf16* y;
  const bf16* x;
  const float* matrix;
  CodesOut out;
  std::int64_t x_row, y_row, rows;
  float scale;

  __host__ __device__ int padded_lines() const { return 16 * shape.order_tiles(); }
};

/// What a thread block has in shared memory: lines, twice, or ups behind the gates' lines; signs; the
/// matrix's signs.
struct Layout {
  int stage, signs, matrix, bytes;

  __host__ __device__ Layout(const Arguments& a, bool swiglu) {
    stage = a.padded_lines() * kLine * 16;
    signs = stage + (swiglu ? a.shape.order * kPacks * 16 : stage);
    matrix = signs + a.shape.sign_words() * 4;
    bytes = matrix + a.shape.matrix_bytes();
  }
};

/// A thread's packs of a row: always the same one of a line, of every so many lines.
template <typename Body>
__device__ __forceinline__ void for_packs(const SignsShape& s, Body&& body) {
  const int pack = static_cast<int>(threadIdx.x) % kPacks, step = static_cast<int>(blockDim.x) / kPacks;
  for (int line = static_cast<int>(threadIdx.x) / kPacks; line < s.order; line += step) body(line, pack);
}

/// Lines of a row to shared memory, `line_packs` from each to the next.
template <int kLinePacks>
__device__ __forceinline__ void copy_lines(uint4* to, const bf16* from, const SignsShape& s) {
  for_packs(s, [&](int line, int pack) {
    copy_async(to + line * kLinePacks + pack, from + line * kColumns + pack * 8, true);
  });
}

/// The sums of 16 results' lines: signs [tiles of lines][32], `lines` the address of a row's for ldmatrix.
__device__ __forceinline__ void sum_lines(Sums& c, const unsigned* signs, unsigned lines, int order_tiles) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int t = 0; t < kSignTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) c[t][e] = 0.0F;
  }
#pragma unroll 1
  for (int k = 0; k < order_tiles; ++k) {
    const unsigned word = signs[k * 32 + lane];
    std::uint32_t ones[4];
#pragma unroll
    for (int r = 0; r < 4; ++r) ones[r] = (word << r & 0x80008000U) | 0x3f803f80U;
#pragma unroll
    for (int t = 0; t < kSignTiles; t += 2) {
      std::uint32_t x[4];
      load_matrices_transposed_at(x, lines + static_cast<unsigned>(t * 16));
      mma(c[t], ones, x[0], x[1]);
      mma(c[t + 1], ones, x[2], x[3]);
    }
    lines += 16 * kLine * 16;
  }
}

/// A butterfly between lanes whose numbers differ in bit kBit, and of that bit with the one of tiles: tiles
/// without it have the sums afterwards, those with it the differences, negative in the upper lanes.
template <int kBit>
__device__ __forceinline__ void butterflies_of_lanes(Sums& c) {
  constexpr int kApart = 1 << kBit;
#pragma unroll
  for (int t = 0; t < kSignTiles; ++t) {
    if ((t & kApart) != 0) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float got = traded(c[t][e], c[t + kApart][e], kApart);
      const float own = kept(c[t][e], c[t + kApart][e], kApart);
      c[t][e] = own + got;
      c[t + kApart][e] = own - got;
    }
  }
}

// A lane's results: eight columns of tile 4 n + lane % 4 and line 8 half + lane / 4, to take(n, half, pack).

/// Of sums that butterflies go over.
template <typename Take>
__device__ __forceinline__ void butterflies(Sums& c, float scale, Take&& take) {
  butterflies_within_pairs(c);
  butterflies_of_tiles<0>(c);
  butterflies_of_tiles<1>(c);
  butterflies_of_tiles<2>(c);
  butterflies_of_tiles<3>(c);
  butterflies_of_lanes<0>(c);
  butterflies_of_lanes<1>(c);
  const float first = (threadIdx.x & 1) != 0 ? -1.0F : 1.0F, second = (threadIdx.x & 2) != 0 ? -1.0F : 1.0F;
  const float scales[4] = {scale, scale * first, scale * second, scale * first * second};
#pragma unroll
  for (int n = 0; n < kSignTiles / 4; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Pack<bf16> pack;
#pragma unroll
      for (int e = 0; e < 8; ++e) pack.v[e] = c[4 * n + e / 2][2 * half + e % 2] * scales[e / 2];
      take(n, half, repack(pack));
    }
  }
}

/// Of sums that are the results: lanes and tiles trade two bits.
template <typename Take>
__device__ __forceinline__ void no_butterflies(const Sums& c, float scale, Take&& take) {
#pragma unroll
  for (int n = 0; n < kSignTiles / 4; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned w[4];
#pragma unroll
      for (int t = 0; t < 4; ++t)
        w[t] = two_bf16(c[4 * n + t][2 * half] * scale, c[4 * n + t][2 * half + 1] * scale);
#pragma unroll
      for (int apart = 1; apart <= 2; apart *= 2) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          if ((t & apart) != 0) continue;
          const unsigned got = traded(w[t], w[t + apart], apart);
          const bool upper = (threadIdx.x & apart) != 0;
          w[t + apart] = upper ? w[t + apart] : got;
          w[t] = upper ? got : w[t];
        }
      }
      take(n, half, make_uint4(w[0], w[1], w[2], w[3]));
    }
  }
}

/// Gates' lines become those of silu(gate) * up, each thread's own packs; ups' places are filled with those
/// at `next`, if it is not null.
__device__ __forceinline__ void swiglu_lines(uint4* gates, uint4* ups, const bf16* next,
                                             const SignsShape& s) {
  for_packs(s, [&](int line, int pack) {
    Pack<bf16> gate = unpack<bf16>(gates[line * kLine + pack]);
    const Pack<bf16> up = unpack<bf16>(ups[line * kPacks + pack]);
#pragma unroll
    for (int e = 0; e < 8; ++e) gate.v[e] = quick_silu(gate.v[e]) * up.v[e];
    gates[line * kLine + pack] = repack(gate);
    if (next != nullptr) copy_async(ups + line * kPacks + pack, next + line * kColumns + pack * 8, true);
  });
}

/// Reads x (of a SwiGLU 2 * rows * width elements), writes y, or a byte an element.
template <Rows kRows, bool kButterflies, int kMostWarps, int kBlocks>
__global__ void __launch_bounds__(32 * kMostWarps, kBlocks) lines_kernel(Arguments a) {
  constexpr bool kSwiglu = kRows == Rows::CodedSwiglu, kCoded = kRows != Rows::Stored;
  extern __shared__ uint4 shared[];
  __shared__ int largest[kMostWarps];
  auto* bytes = reinterpret_cast<unsigned char*>(shared);
  const Layout at(a, kSwiglu);
  const SignsShape& s = a.shape;
  auto* signs = reinterpret_cast<unsigned*>(bytes + at.signs);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32, order_tiles = s.order_tiles();
  uint4* const second = reinterpret_cast<uint4*>(bytes + at.stage);  // the other lines, or ups
  std::int64_t row = blockIdx.x;
  copy_lines<kLine>(shared, a.x + row * a.x_row, s);
  if constexpr (kSwiglu) copy_lines<kPacks>(second, a.x + row * a.x_row + s.order * kColumns, s);
  commit_copies();
  // Lines behind the last are zero, and stay so.
  const int after = s.order * kLine, packs = a.padded_lines() * kLine;
  for (int i = after + static_cast<int>(threadIdx.x); i < packs; i += static_cast<int>(blockDim.x)) {
    shared[i] = make_uint4(0, 0, 0, 0);
    if constexpr (!kSwiglu) second[i] = make_uint4(0, 0, 0, 0);
  }
  read_matrix(bytes + at.matrix, a.matrix, s);
  __syncthreads();
  arrange_signs(signs, bytes + at.matrix, s);
  // Of the lane, where ldmatrix reads: line lane % 16, and of two tiles one each half of the warp.
  const unsigned own = shared_address(shared) + static_cast<unsigned>((lane % 16 * kLine + lane / 16) * 16);
  unsigned stage = 0;  // bytes
  for (; row < a.rows; row += gridDim.x) {
    const bool more = row + gridDim.x < a.rows;
    const bf16* const from = a.x + (row + gridDim.x) * a.x_row;  // the next
    if constexpr (kSwiglu) {
      wait_copies<0>();
      swiglu_lines(shared, second, more ? from + s.order * kColumns : nullptr, s);
    } else {
      if (more) copy_lines<kLine>(stage == 0 ? second : shared, from, s);
      commit_copies();
      wait_copies<1>();
    }
    __syncthreads();
    uint4 results[kCoded ? kSignTiles / 4 : 1][2];
    const auto compute = [&](int tile) {
      const int line = tile * 16 + lane / 4;
      const auto take = [&](int n, int half, const uint4& pack) {
        if constexpr (kCoded) {
          results[n][half] = pack;
        } else if (line + 8 * half < s.order) {
          bf16* const to = a.y + row * a.y_row + line * kColumns + lane % 4 * 8;
          RawPack<bf16>{pack}.store(to + n * 32 + half * 8 * kColumns);
        }
      };
      Sums c;
      sum_lines(c, signs + tile * order_tiles * 32, own + stage, order_tiles);
      if constexpr (kButterflies) {
        butterflies(c, a.scale, take);
      } else {
        no_butterflies(c, a.scale, take);
      }
    };
    if constexpr (kCoded || kMostWarps == kFewWarps) {
      compute(warp);  // there are as many warps
    } else {
      for (int tile = warp; tile < order_tiles; tile += warps) compute(tile);
    }
    if constexpr (kCoded) {
      const int line = warp * 16 + lane / 4;
      int bits = 0;
#pragma unroll
      for (int n = 0; n < kSignTiles / 4; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (line + 8 * half < s.order) bits = largest_bits(Pack<bf16>{}, results[n][half], bits);
        }
      }
      bits = __reduce_max_sync(kFullWarp, bits);
      if (lane == 0) largest[warp] = bits;
      __syncthreads();
      if constexpr (kSwiglu) {  // gates have been read for the last time
        if (more) copy_lines<kLine>(shared, from, s);
        commit_copies();
      }
      for (int w = 0; w < warps; ++w) bits = max(bits, largest[w]);
      const RowScale scale(a.out.rule, bits);
      if (threadIdx.x == 0) a.out.scales[row] = scale.stored();
      std::int8_t* const to = a.out.codes + row * a.out.row_bytes + line * kColumns + lane % 4 * 8;
#pragma unroll
      for (int n = 0; n < kSignTiles / 4; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (line + 8 * half >= s.order) continue;
          unsigned codes[2];
          scale.codes_of<8>(codes, unpack<bf16>(results[n][half]).v);
          store_words(to + n * 32 + half * 8 * kColumns, codes);
        }
      }
    } else {
      __syncthreads();  // the copies after next go where this row's lines are
    }
    if constexpr (!kSwiglu) stage = static_cast<unsigned>(at.stage) - stage;
  }
}

template <Rows kRows, bool kButterflies, int kMostWarps, int kBlocks>
void launch_lines(const Arguments& a, int multiprocessors, cudaStream_t stream) {
  const int bytes = Layout(a, kRows == Rows::CodedSwiglu).bytes,
            warps = std::min(kMostWarps, a.shape.order_tiles());
  const auto fit = static_cast<int>((most_shared_bytes() + 1024) / (bytes + 2048));
  const int at_once = multiprocessors * std::max(1, std::min(fit, kMostWarps * kBlocks / warps));
  launch(kRows == Rows::Stored ? "hadamard_forward" : "make_codes",
         lines_kernel<kRows, kButterflies, kMostWarps, kBlocks>,
         {static_cast<unsigned>(std::min<std::int64_t>(a.rows, at_once)), static_cast<unsigned>(32 * warps),
          static_cast<std::size_t>(bytes), true},
         stream, a);
}

template <Rows kRows, bool kButterflies>
void launch_lines(const Arguments& a, int multiprocessors, cudaStream_t stream) {
  if (a.shape.order_tiles() <= kFewWarps) {
    launch_lines<kRows, kButterflies, kFewWarps, 6>(a, multiprocessors, stream);
  } else {
    launch_lines<kRows, kButterflies, 8, 2>(a, multiprocessors, stream);
  }
}

template <Rows kRows>
bool run(const HadamardOperands<bf16>& h, const CodesOut& out, int multiprocessors, cudaStream_t stream) {
  const HadamardShape& s = h.s;
  Arguments a{{}, h.y, h.x, h.matrix, out, s.x_row(), s.y_row(), s.rows, h.scale()};
  const bool whole = packs<bf16>(h.x, s.width()) && aligned(h.y) && aligned(h.matrix) && s.x_row() % 8 == 0 &&
                     s.y_row() % 8 == 0;
  if (!whole || !cut_up(a.shape, s) || a.shape.columns != kColumns || a.shape.blocks > 1) return false;
  if (a.shape.to > a.shape.from && (a.shape.from > 0 || a.shape.to < 7)) return false;
  if (kRows != Rows::Stored && a.shape.order_tiles() > 8) return false;
  if (Layout(a, kRows == Rows::CodedSwiglu).bytes + 1024 > most_shared_bytes()) return false;
  if (a.rows == 0) return true;
  if (a.shape.to > a.shape.from) {
    launch_lines<kRows, true>(a, multiprocessors, stream);
  } else {
    launch_lines<kRows, false>(a, multiprocessors, stream);
  }
  return true;
}

}  // namespace

bool hadamard_by_lines(const HadamardOperands<bf16>& h, int multiprocessors, cudaStream_t stream) {
  return run<Rows::Stored>(h, {}, multiprocessors, stream);
}

bool hadamard_codes_by_lines(const HadamardOperands<bf16>& h, bool swiglu, const CodesOut& out,
                             int multiprocessors, cudaStream_t stream) {
  if (!aligned(out.codes)) return false;
  return swiglu ? run<Rows::CodedSwiglu>(h, out, multiprocessors, stream)
                : run<Rows::Coded>(h, out, multiprocessors, stream);
}

}  // namespace fathom::cuda
