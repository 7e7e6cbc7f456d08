// RMSNorm whose rows become codes of few bits and are wanted by nobody else: with the bits of norm.cu and
// quantize_rows.cu, without the rows in between.
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/norm_rows.cuh"
#include "kernels/cuda/device/row_codes.cuh"
#include "kernels/cuda/row_codes.h"

namespace fathom::cuda {

namespace {

template <typename T>
struct Arguments {
  NormRows<T> rows;
  CodesOut out;
};

/// Reads x (and a), writes a byte an element (and h).
template <typename T, int kPacks, int kWarps>
__global__ void __launch_bounds__(128) norm_codes_kernel(Arguments<T> a) {
  constexpr int kN = kPack<T>, kLanes = 32 * kWarps;
  NormedRow<T, kPacks, kWarps> row(a.rows);
  if (row.number >= a.rows.rows) return;  // whole warps; of several warps a row there is none
  int bits = 0;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    row.raw[k] = row.lane + k * kLanes < row.packs ? row.normed(a.rows, k) : uint4{};
    bits = largest_bits(Pack<T>{}, row.raw[k], bits);
  }
  if constexpr (kWarps == 1) {
    bits = __reduce_max_sync(kFullWarp, bits);
  } else {
    bits = largest_of_block<kWarps>(bits);
  }
  const RowScale scale(a.out.rule, bits);
  if (row.lane == 0) a.out.scales[row.number] = scale.stored();
  std::int8_t* to = a.out.codes + row.number * a.out.row_bytes;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int i = row.lane + k * kLanes;
    if (i * kN >= a.out.row_bytes) continue;  // zeros behind the columns are the codes of packs that are zero
    unsigned words[kN / 4];
    scale.template codes_of<kN>(words, unpack<T>(row.raw[k]).v);
    store_words(to + i * kN, words);
  }
}

}  // namespace

template <typename T>
bool norm_codes(const NormRows<T>& p, const CodesOut& out, cudaStream_t stream) {
  const bool whole = packs<T>(p.x, p.width) && packs<float>(p.w, p.width) && packs<T>(p.a, p.width) &&
                     packs<T>(p.h, p.width) && aligned(out.codes);
  return whole && for_row_class(p.width / kPack<T>, [&](auto c) {
           using Class = decltype(c);
           launch("make_codes", norm_codes_kernel<T, Class::packs, Class::warps>,
                  {blocks_for(p.rows, 4 / Class::warps), 128}, stream, Arguments<T>{p, out});
         });
}

template bool norm_codes(const NormRows<float>& p, const CodesOut& out, cudaStream_t stream);
template bool norm_codes(const NormRows<bf16>& p, const CodesOut& out, cudaStream_t stream);

}  // namespace fathom::cuda
