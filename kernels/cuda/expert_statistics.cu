// What the metrics say of the experts of a layer: sums by block of rows, then over the blocks.
#include <cuda_runtime.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/reduce.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMostBlocks = 128;

/// What a block leaves: these, then the load of each expert. Counts stay exact in fp32 up to 2^24.
enum Part { kUncovered, kFilled, kChosen, kDropped, kToNoop, kNoop, kEntropy, kParts };

struct Layer {
  float* parts;               // [blocks, kParts + E]
  const float* affinity;      // [choices, N]
  const float* weights;       // [choices, N], or null
  const std::int32_t* slots;  // [E, N]
  std::int64_t rows, experts, choices;
};

/// Reads the affinity and the weights once and the slots twice, the second time from cache.
__global__ void __launch_bounds__(kThreads) rows_kernel(Layer l) {
  __shared__ float shared[32];
  const std::int64_t first = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const std::int64_t step = std::int64_t{gridDim.x} * kThreads;
  float part[kParts] = {};
  for (std::int64_t n = first; n < l.rows; n += step) {
    float own = 0.0F, noop = 0.0F, entropy = 0.0F, largest = l.affinity[n];
    bool favours_noop = false;
    for (std::int64_t e = 0; e < l.experts; ++e) own += l.slots[e * l.rows + n] >= 0 ? 1.0F : 0.0F;
    for (std::int64_t e = 0; e < l.choices; ++e) {
      const float p = l.affinity[e * l.rows + n];
      if (p > largest) {
        largest = p;
        favours_noop = e >= l.experts;
      }
      if (e >= l.experts) noop += p;
      if (l.weights != nullptr && l.weights[e * l.rows + n] > 0.0F) {
        part[kChosen] += 1.0F;
        if (e < l.experts && l.slots[e * l.rows + n] < 0) part[kDropped] += 1.0F;
      }
      if (p > 0.0F) entropy -= p * logf(p);
    }
    part[kUncovered] += own == 0.0F ? 1.0F : 0.0F;
    part[kFilled] += own;
    part[kToNoop] += favours_noop ? 1.0F : 0.0F;
    part[kNoop] += noop;
    part[kEntropy] += entropy;
  }
  float* out = l.parts + std::int64_t{blockIdx.x} * (kParts + l.experts);
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const float total = block_reduce(part[i], Sum{}, shared);
    if (threadIdx.x == 0) out[i] = total;
  }
  for (std::int64_t e = 0; e < l.experts; ++e) {
    float load = 0.0F;
    for (std::int64_t n = first; n < l.rows; n += step) load += l.slots[e * l.rows + n] >= 0 ? 1.0F : 0.0F;
    load = block_reduce(load, Sum{}, shared);
    if (threadIdx.x == 0) out[kParts + e] = load;
  }
}

/// One block over the parts of all.
__global__ void __launch_bounds__(kThreads) layer_kernel(float* out, Layer l, std::int64_t blocks) {
  __shared__ float shared[32];
  __shared__ float totals[kParts];
  const std::int64_t columns = kParts + l.experts;
  float busiest = 0.0F, idlest = INFINITY;
  for (std::int64_t column = threadIdx.x; column < columns; column += kThreads) {
    float total = 0.0F;
    for (std::int64_t b = 0; b < blocks; ++b) total += l.parts[b * columns + column];
    if (column < kParts) {
      totals[column] = total;
    } else {
      busiest = fmaxf(busiest, total);
      idlest = fminf(idlest, total);
    }
  }
  busiest = block_reduce(busiest, Max{}, shared);  // its barriers are also those of `totals`
  idlest = block_reduce(idlest, Min{}, shared);
  if (threadIdx.x != 0) return;
  const auto rows = static_cast<float>(l.rows);
  const float mean = totals[kFilled] > 0.0F ? totals[kFilled] / static_cast<float>(l.experts) : 1.0F;
  out[0] = totals[kUncovered] / rows;
  out[1] = totals[kFilled] / rows;
  out[2] = totals[kChosen] > 0.0F ? totals[kDropped] / totals[kChosen] : 0.0F;
  out[3] = busiest / mean;
  out[4] = idlest / mean;
  out[5] = totals[kNoop] / rows;
  out[6] = totals[kToNoop] / rows;
  out[7] = totals[kEntropy] / rows;
}

}  // namespace

void CudaBackend::expert_statistics(View out, ConstView affinity, ConstView weights, ConstView slots,
                                    std::int64_t choices, const ExpertShape& s) {
  const char* op = "expert_statistics";
  if (s.rows < 1) fail(op, "rows", s.rows, 1);
  if (s.experts < 1 || choices < s.experts) fail(op, "choices", choices, s.experts);
  const std::int64_t needed = (s.rows + kThreads - 1) / kThreads;
  const std::int64_t blocks = needed < kMostBlocks ? needed : kMostBlocks;
  const Layer l{scratch_of<float>(blocks * (kParts + s.experts)),
                input<float>(op, "affinity", affinity, choices * s.rows),
                optional_input<float>(op, "weights", weights, choices * s.rows),
                input<std::int32_t>(op, "slots", slots, s.experts * s.rows),
                s.rows,
                s.experts,
                choices};
  rows_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream()>>>(l);
  check_launch(op);
  layer_kernel<<<1, kThreads, 0, stream()>>>(output<float>(op, "out", out, 8), l, blocks);
  check_launch(op);
}

}  // namespace fathom::cuda
