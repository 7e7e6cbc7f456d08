// The speed of a matrix product on this machine, the ceiling of a training step, and of reading, that of
// decoding.
#pragma once

#include <cstdint>

#include "kernels/backend.h"

namespace fathom::app {

/// OpenBLAS's best rate over 20 products y = x W^T, x [rows, in], W [out, in], in FLOP/s, on the threads that
/// the backend was made with.
double gemm_rate(std::int64_t rows, std::int64_t in, std::int64_t out);

/// The same of a backend's own linear_forward in `compute`: for a GPU, cuBLASLt's rate. On the CPU,
/// gemm_rate.
double gemm_rate(Backend& backend, DType compute, std::int64_t rows, std::int64_t in, std::int64_t out);

/// Bytes a second at which the backend reads memory that no cache holds, at its best of 10 passes: the
/// ceiling of decoding.
double read_rate(Backend& backend);

}  // namespace fathom::app
