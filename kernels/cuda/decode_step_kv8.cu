// The kernels of a decoding step over caches of codes of 8 bits (device/decode_whole.cuh).
#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/decode_whole.cuh"

namespace fathom::cuda {

const void* decode_kernel_kv8(const DecodeKind& k) { return decode_kernel_over<8>(k); }

}  // namespace fathom::cuda
