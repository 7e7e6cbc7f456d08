// out[i] = from[indices[i]] by rows: what gather_rows and the embedding share.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

template <typename T>
struct RowGather {
  T* out;         // [rows, width]
  const T* from;  // [source_rows, width]
  const std::int32_t* indices;
  std::int64_t rows, source_rows, width;
};

/// A warp copies a row, up to 4 chunks of every lane in flight. An index outside [0, source_rows), which the
/// CPU backend throws on, gives a row of zeros. Traffic: each gathered row read and written once, and the
/// indices. Rows of a table come again: what is written leaves the L2 cache to them.
template <typename Chunk>
__global__ void __launch_bounds__(256) gather_rows_kernel(RowGather<Chunk> g) {
  constexpr int kInFlight = 4;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row = std::int64_t{blockIdx.x} * 8 + threadIdx.x / 32;
  if (row >= g.rows) return;
  const std::int64_t index = g.indices[row];
  const bool inside = index >= 0 && index < g.source_rows;
  const Chunk* from = g.from + (inside ? index : 0) * g.width;
  Chunk* to = g.out + row * g.width;
  for (std::int64_t begin = lane; begin < g.width; begin += 32 * kInFlight) {
    Chunk chunk[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      chunk[u] = Chunk{};
      if (inside && begin + 32 * u < g.width) chunk[u] = from[begin + 32 * u];
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (begin + 32 * u < g.width) __stcs(to + begin + 32 * u, chunk[u]);
    }
  }
}

template <typename T>
void gather_rows(const char* op, const RowGather<T>& g, cudaStream_t stream) {
  if (g.rows == 0 || g.width == 0) return;
  const unsigned blocks = blocks_for(g.rows, 8);
  if (packs<T>(g.out, g.width) && packs<T>(g.from, g.width)) {
    const RowGather<uint4> by_chunk{reinterpret_cast<uint4*>(g.out),
                                    reinterpret_cast<const uint4*>(g.from),
                                    g.indices,
                                    g.rows,
                                    g.source_rows,
                                    g.width / kPack<T>};
    gather_rows_kernel<<<blocks, 256, 0, stream>>>(by_chunk);
  } else {
    gather_rows_kernel<<<blocks, 256, 0, stream>>>(g);
  }
  check_launch(op);
}

}  // namespace fathom::cuda
