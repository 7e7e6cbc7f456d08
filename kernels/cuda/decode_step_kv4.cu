// The kernels of a decoding step over caches of codes of 4 bits (device/decode_whole.cuh).
#include "kernels/cuda/decode_step.h"
#include "kernels/cuda/device/decode_whole.cuh"

namespace fathom::cuda {

const void* decode_kernel_kv4(const DecodeKind& k) { return decode_kernel_over<4>(k); }

}  // namespace fathom::cuda
