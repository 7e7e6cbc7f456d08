// Sylvester's transforms of blocks that a warp holds in its registers. An element's place within what a warp
// holds has as many bits: the low ones are its place in a pack, the next five its lane, the high ones its
// pack; a butterfly of a lane's bit is a shuffle, any other is two sums. At most 320 shuffles and 704 sums a
// lane go with 8 KiB read and written, which take longer.
#include <algorithm>
#include <type_traits>

#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/raw_pack.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/row_codes.cuh"
#include "kernels/cuda/device/sigmoid.cuh"
#include "kernels/cuda/hadamard.h"
#include "kernels/cuda/row_codes.h"

namespace fathom::cuda {

namespace {

constexpr int kWarps = 4;  // each on its own
constexpr int kMostPacks = 8;

enum class Rows : std::uint8_t { Stored, Coded, CodedSwiglu };

template <typename T>
struct Arguments {
  T* y;
  const T* x;                                          // of a SwiGLU gates, and ups `packs` packs behind them
  std::int64_t x_row, y_row, packs, parts, all_parts;  // packs, parts: of a row; a warp has a part
  int from, to;                                        // the bits that are transformed
  float scale;
  CodesOut out;
};

/// Elements whose places differ in bit kBit of the registers' part become their sum and their difference.
template <int kBit, int N>
__device__ __forceinline__ void butterflies_of_registers(float (&v)[N]) {
  constexpr int kHalf = 1 << kBit;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if ((i & kHalf) != 0) continue;
    const float low = v[i], high = v[i + kHalf];
    v[i] = low + high;
    v[i + kHalf] = low - high;
  }
}
template <int N>
__device__ __forceinline__ void butterflies_of_lanes(float (&v)[N], int apart) {
  const float sign = (threadIdx.x & apart) != 0 ? -1.0F : 1.0F;
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = fmaf(sign, v[i], __shfl_xor_sync(kFullWarp, v[i], apart));
}

/// The bits of the registers from kBit on, of kBits; in the order of the places' bits, which are `shift`
/// more.
template <int kBit, int kEnd, int N>
__device__ __forceinline__ void some_registers(float (&v)[N], int shift, int from, int to) {
  if constexpr (kBit < kEnd) {
    if (kBit + shift >= from && kBit + shift < to) butterflies_of_registers<kBit>(v);
    some_registers<kBit + 1, kEnd>(v, shift, from, to);
  }
}

constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

/// silu(gate) * up, rounded as if it were stored.
template <typename T>
__device__ __forceinline__ Pack<T> swiglu_of(const uint4& gates, const uint4& ups) {
  Pack<T> gate = unpack<T>(gates);
  const Pack<T> up = unpack<T>(ups);
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e) {
    if constexpr (std::is_same_v<T, bf16>) {
      gate.v[e] = quick_silu(gate.v[e]) * up.v[e];
    } else {
      gate.v[e] = gate.v[e] * fast_sigmoid(gate.v[e]) * up.v[e];
    }
  }
  return unpack<T>(repack(gate));
}

/// Reads x (of a SwiGLU 2 * rows * width elements), writes y, or a byte an element: then a part is a row.
template <typename T, int kPacks, Rows kRows>
__global__ void __launch_bounds__(32 * kWarps) butterflies_kernel(Arguments<T> a) {
  constexpr int N = kPack<T>, kInPack = log2_of(N), kInRegisters = log2_of(N * kPacks);
  const std::int64_t part = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (part >= a.all_parts) return;  // whole warps
  const std::int64_t row = part / a.parts, first = part % a.parts * (32 * kPacks) + threadIdx.x % 32;
  const T* from = a.x + row * a.x_row;
  uint4 raw[kPacks], ups[kRows == Rows::CodedSwiglu ? kPacks : 1];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const std::int64_t i = first + k * 32;
    raw[k] = i < a.packs ? load_raw(from + i * N) : make_uint4(0, 0, 0, 0);
    if constexpr (kRows == Rows::CodedSwiglu)
      ups[k] = i < a.packs ? load_raw(from + (a.packs + i) * N) : make_uint4(0, 0, 0, 0);
  }
  float v[kPacks * N];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    Pack<T> pack;
    if constexpr (kRows == Rows::CodedSwiglu) {
      pack = swiglu_of<T>(raw[k], ups[k]);
    } else {
      pack = unpack<T>(raw[k]);
    }
#pragma unroll
    for (int e = 0; e < N; ++e) v[k * N + e] = pack.v[e];
  }
  some_registers<0, kInPack>(v, 0, a.from, a.to);
#pragma unroll 1
  for (int bit = max(a.from, kInPack); bit < min(a.to, kInPack + 5); ++bit)
    butterflies_of_lanes(v, 1 << (bit - kInPack));
  some_registers<kInPack, kInRegisters>(v, 5, a.from, a.to);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    Pack<T> pack;
#pragma unroll
    for (int e = 0; e < N; ++e) pack.v[e] = v[k * N + e] * a.scale;
    raw[k] = repack(pack);
  }
  if constexpr (kRows == Rows::Stored) {
    T* to = a.y + row * a.y_row;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const std::int64_t i = first + k * 32;
      if (i < a.packs) RawPack<T>{raw[k]}.store(to + i * N);
    }
  } else {
    // Packs behind the last are zero, and so are their codes.
    int bits = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) bits = largest_bits(Pack<T>{}, raw[k], bits);
    bits = __reduce_max_sync(kFullWarp, bits);
    const RowScale scale(a.out.rule, bits);
    if (threadIdx.x % 32 == 0) a.out.scales[row] = scale.stored();
    std::int8_t* to = a.out.codes + row * a.out.row_bytes;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const std::int64_t i = first + k * 32;
      if (i * N >= a.out.row_bytes) continue;
      unsigned words[N / 4];
      scale.codes_of<N>(words, unpack<T>(raw[k]).v);
      store_words(to + i * N, words);
    }
  }
}

bool is_power_of_two(std::int64_t n) { return n > 0 && (n & (n - 1)) == 0; }

template <typename T>
Arguments<T> arguments_of(const HadamardOperands<T>& h) {
  const HadamardShape& s = h.s;
  Arguments<T> a{h.y, h.x, s.x_row(), s.y_row(), s.width() / kPack<T>, 0, 0, 0, 0, h.scale(), {}};
  while ((std::int64_t{1} << a.from) < s.inner) ++a.from;
  a.to = a.from;
  while ((std::int64_t{1} << a.to) < s.block()) ++a.to;
  return a;
}

template <Rows kRows, typename T, int kPacks>
void launch_packs(Arguments<T>& a, std::int64_t rows, cudaStream_t stream) {
  a.parts = blocks_for(a.packs, 32 * kPacks);
  a.all_parts = rows * a.parts;
  launch(kRows == Rows::Stored ? "hadamard_forward" : "make_codes", butterflies_kernel<T, kPacks, kRows>,
         {blocks_for(a.all_parts, kWarps), 32 * kWarps}, stream, a);
}

/// With so many packs in a warp's registers.
template <Rows kRows, typename T>
void launch_butterflies(Arguments<T>& a, std::int64_t wanted, std::int64_t rows, cudaStream_t stream) {
  if (wanted <= 32) {
    launch_packs<kRows, T, 1>(a, rows, stream);
  } else if (wanted <= 64) {
    launch_packs<kRows, T, 2>(a, rows, stream);
  } else if (wanted <= 128) {
    launch_packs<kRows, T, 4>(a, rows, stream);
  } else {
    launch_packs<kRows, T, kMostPacks>(a, rows, stream);
  }
}

}  // namespace

template <typename T>
bool takes_butterflies(const HadamardOperands<T>& h) {
  const HadamardShape& s = h.s;
  const bool whole =
      packs<T>(h.x, s.width()) && aligned(h.y) && s.x_row() % kPack<T> == 0 && s.y_row() % kPack<T> == 0;
  return whole && s.factor == 1 && is_power_of_two(s.inner) && s.block() <= 32 * kMostPacks * kPack<T>;
}

template <typename T>
bool hadamard_by_butterflies(const HadamardOperands<T>& h, cudaStream_t stream) {
  if (!takes_butterflies(h)) return false;
  Arguments<T> a = arguments_of(h);
  // As few packs as hold a block, but two: what a lane waits for together.
  const std::int64_t of_block = h.s.block() / kPack<T>;
  launch_butterflies<Rows::Stored>(a, std::min(a.packs, std::max<std::int64_t>(64, of_block)), h.s.rows,
                                   stream);
  return true;
}

template <typename T>
bool hadamard_codes_by_butterflies(const HadamardOperands<T>& h, bool swiglu, const CodesOut& out,
                                   cudaStream_t stream) {
  if (!takes_butterflies(h) || !aligned(out.codes) || h.s.width() > 32 * kMostPacks * kPack<T>) return false;
  Arguments<T> a = arguments_of(h);
  a.out = out;
  if (swiglu) {
    launch_butterflies<Rows::CodedSwiglu>(a, a.packs, h.s.rows, stream);
  } else {
    launch_butterflies<Rows::Coded>(a, a.packs, h.s.rows, stream);
  }
  return true;
}

template bool takes_butterflies(const HadamardOperands<float>& h);
template bool takes_butterflies(const HadamardOperands<bf16>& h);
template bool hadamard_by_butterflies(const HadamardOperands<float>& h, cudaStream_t stream);
template bool hadamard_by_butterflies(const HadamardOperands<bf16>& h, cudaStream_t stream);
template bool hadamard_codes_by_butterflies(const HadamardOperands<float>& h, bool swiglu,
                                            const CodesOut& out, cudaStream_t stream);
template bool hadamard_codes_by_butterflies(const HadamardOperands<bf16>& h, bool swiglu, const CodesOut& out,
                                            cudaStream_t stream);

}  // namespace fathom::cuda
