// Which rows of a pass come alone, as decoding has them, and which come many of a sequence at a time, as
// prompts have them.
#pragma once

#include <cstdint>

#include "kernels/cuda/device/reduce.cuh"

namespace fathom::cuda {

inline constexpr int kManyRows = 8;

/// Whether the sequence of a row has at least kManyRows rows in the pass; they stand together. By a whole
/// warp.
__device__ __forceinline__ bool has_many_rows(const std::int32_t* sequences, int rows, int row) {
  const int lane = static_cast<int>(threadIdx.x) % 32, at = row - (kManyRows - 1) + lane;
  const bool same = lane < 2 * kManyRows - 1 && at >= 0 && at < rows && sequences[at] == sequences[row];
  return __popc(__ballot_sync(kFullWarp, same)) >= kManyRows;
}

}  // namespace fathom::cuda
