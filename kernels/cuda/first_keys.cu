// The first row of each row's document, for document masks.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/device/launch.cuh"

namespace fathom::cuda {

namespace {

struct Task {
  std::int32_t* first_key;
  const std::int32_t* documents;
  std::int64_t rows;
  std::int64_t seq;
};

/// documents do not decrease within a sequence, so the first equal one is found by halving.
/// Traffic: documents and first_key once; the search reads from the caches.
__global__ void first_keys_kernel(const Task task) {
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= task.rows) return;
  const std::int64_t sequence = row / task.seq * task.seq;
  const std::int32_t document = task.documents[row];
  std::int64_t low = sequence, high = row;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (task.documents[middle] < document) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  task.first_key[row] = static_cast<std::int32_t>(low - sequence);
}

}  // namespace

void first_keys_of(std::int32_t* first_key, const std::int32_t* documents, std::int64_t batch,
                   std::int64_t seq, cudaStream_t stream) {
  const Task task{first_key, documents, batch * seq, seq};
  launch("first_keys", first_keys_kernel, {blocks_for(task.rows, 256), 256, 0}, stream, task);
}

}  // namespace fathom::cuda
