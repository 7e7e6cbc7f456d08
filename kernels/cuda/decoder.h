// kernels/decoder.h on a GPU: its memory, its tables, and the launches.
#pragma once

#include <memory>

#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/handles.h"
#include "kernels/decoder.h"

namespace fathom::cuda {

class CudaBackend;

/// Null before Hopper, and for a model that device/decode_whole.cuh does not do: not bf16, heads other than
/// 64 or 128 wide, more than kDecodeGroup query heads for one of keys, transforms but no cache of codes,
/// sizes that are no multiples of 32 or below 256; of weights that are codes others than of 4 bits, some
/// matrices alone, and columns or groups that are no multiples of 128. Null in the row-invariant mode too.
std::unique_ptr<Decoder> open_decoder(CudaBackend& backend, const float* frequencies,
                                      const DecoderModel& model);

}  // namespace fathom::cuda
