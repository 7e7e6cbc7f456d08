// Token choice: the experts that each row chooses, the slots that they have for it, and the losses of their
// router.
#include <cuda_runtime.h>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/reduce.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Choice {
  float* out;             // weights, or the gradient of the affinity [choices, rows]
  const float* dweights;  // backward
  const float* affinity;
  const float* weights;  // backward
  std::int64_t rows, choices, top_k;
};

/// A thread a row. Traffic: a write of the weights, and a read of both for each of the top_k and once more,
/// from cache.
__global__ void __launch_bounds__(kThreads) choose_kernel(Choice c) {
  const std::int64_t n = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= c.rows) return;
  for (std::int64_t e = 0; e < c.choices; ++e) c.out[e * c.rows + n] = 0.0F;
  float sum = 0.0F;
  for (std::int64_t k = 0; k < c.top_k; ++k) {
    std::int64_t best = -1;
    float most = 0.0F;
    for (std::int64_t e = 0; e < c.choices; ++e) {
      if (c.out[e * c.rows + n] > 0.0F) continue;  // chosen before
      const float p = c.affinity[e * c.rows + n];
      if (best < 0 || p > most) {
        best = e;
        most = p;
      }
    }
    c.out[best * c.rows + n] = most;
    sum += most;
  }
  if (c.top_k == 1) return;
  for (std::int64_t e = 0; e < c.choices; ++e) c.out[e * c.rows + n] /= sum;
}

/// A thread a row. Traffic: two reads of the operands (the second from cache), a write.
__global__ void __launch_bounds__(kThreads) choose_backward_kernel(Choice c) {
  const std::int64_t n = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (n >= c.rows) return;
  float sum = 0.0F, common = 0.0F;
  for (std::int64_t e = 0; e < c.choices; ++e) {
    const std::int64_t at = e * c.rows + n;
    if (c.weights[at] > 0.0F) sum += c.affinity[at];
    common += c.weights[at] * c.dweights[at];
  }
  for (std::int64_t e = 0; e < c.choices; ++e) {
    const std::int64_t at = e * c.rows + n;
    const float own = c.top_k == 1 ? c.dweights[at] : (c.dweights[at] - common) / sum;
    c.out[at] = c.weights[at] > 0.0F ? own : 0.0F;
  }
}

struct Fill {
  std::int32_t* rows;    // [E, B, capacity]
  std::int32_t* slots;   // [E, N]
  const float* weights;  // [E, N]
  std::int64_t source_rows;
  int sequences, seq, capacity;
};

/// A block an expert and a sequence: its rows in order, 256 at a time. Traffic: a read of the weights, a
/// write of the slots and of the rows.
__global__ void __launch_bounds__(kThreads) fill_kernel(Fill f) {
  __shared__ int counts[kWarps];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const std::int64_t pair = blockIdx.x;  // e * B + b
  const std::int64_t first = pair % f.sequences * f.seq, expert = pair / f.sequences * f.source_rows;
  std::int32_t* rows = f.rows + pair * f.capacity;
  int filled = 0;
  for (int base = 0; base < f.seq; base += kThreads) {
    const int t = base + thread;
    const std::int64_t row = first + t;
    const bool chosen = t < f.seq && f.weights[expert + row] > 0.0F;
    const unsigned lanes = __ballot_sync(kFullWarp, chosen);
    if (lane == 0) counts[warp] = __popc(lanes);
    __syncthreads();
    int before = filled;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) before += counts[w];
      filled += counts[w];
    }
    __syncthreads();  // the counts are written anew in the next round
    if (t >= f.seq) continue;
    const int position = before + __popc(lanes & ((1U << lane) - 1U));
    const bool taken = chosen && position < f.capacity;
    f.slots[expert + row] = taken ? static_cast<std::int32_t>(pair * f.capacity + position) : -1;
    if (taken) rows[position] = static_cast<std::int32_t>(row);
  }
  for (int i = min(filled, f.capacity) + thread; i < f.capacity; i += kThreads) rows[i] = -1;
}

struct Balance {
  float* losses;     // [B]
  float* daffinity;  // [choices, rows], or null
  const float* affinity;
  const float* weights;
  SequenceChoices shape;
  float scale;
};

/// A block a sequence. Traffic: two reads of the weights (the second from cache), a read of the affinity and
/// a write of its gradient.
__global__ void __launch_bounds__(kThreads) balance_kernel(Balance a) {
  __shared__ float shared[32];
  const std::int64_t first = std::int64_t{blockIdx.x} * a.shape.seq, rows = a.shape.rows;
  float all = 0.0F;
  for (std::int64_t e = 0; e < a.shape.choices; ++e) {
    for (std::int64_t t = threadIdx.x; t < a.shape.seq; t += kThreads) {
      all += a.weights[e * rows + first + t] > 0.0F ? 1.0F : 0.0F;
    }
  }
  all = block_reduce(all, Sum{}, shared);
  float loss = 0.0F;
  for (std::int64_t e = 0; e < a.shape.choices; ++e) {
    float chosen = 0.0F, sum = 0.0F;
    for (std::int64_t t = threadIdx.x; t < a.shape.seq; t += kThreads) {
      chosen += a.weights[e * rows + first + t] > 0.0F ? 1.0F : 0.0F;
      sum += a.affinity[e * rows + first + t];
    }
    chosen = block_reduce(chosen, Sum{}, shared);
    sum = block_reduce(sum, Sum{}, shared);
    const float slope = static_cast<float>(a.shape.choices) * chosen / all / static_cast<float>(a.shape.seq);
    loss += slope * sum;
    if (a.daffinity == nullptr) continue;
    for (std::int64_t t = threadIdx.x; t < a.shape.seq; t += kThreads) {
      a.daffinity[e * rows + first + t] = slope * a.scale;
    }
  }
  if (threadIdx.x == 0) a.losses[blockIdx.x] = loss;
}

/// Traffic: a read of x, a write of both.
__global__ void __launch_bounds__(kThreads)
    square_kernel(float* losses, float* dx, const float* x, std::int64_t n, float factor) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  losses[i] = x[i] * x[i];
  if (dx != nullptr) dx[i] = factor * x[i];
}

void check_sequences(const char* op, std::int64_t rows, std::int64_t seq) {
  if (seq < 1) fail(op, "seq", seq, 1);
  if (rows % seq != 0) fail(op, "rows", rows, rows / seq * seq);
}

}  // namespace

void CudaBackend::token_choice_forward(View weights, ConstView affinity, std::int64_t rows,
                                       std::int64_t choices, std::int64_t top_k) {
  const char* op = "token_choice_forward";
  if (top_k < 1 || top_k > choices) fail(op, "top_k", top_k, choices);
  const Choice c{output<float>(op, "weights", weights, rows * choices),
                 nullptr,
                 input<float>(op, "affinity", affinity, rows * choices),
                 nullptr,
                 rows,
                 choices,
                 top_k};
  if (rows == 0) return;
  choose_kernel<<<blocks_for(rows, kThreads), kThreads, 0, stream()>>>(c);
  check_launch(op);
}

void CudaBackend::token_choice_backward(View daffinity, ConstView dweights, ConstView affinity,
                                        ConstView weights, std::int64_t rows, std::int64_t choices,
                                        std::int64_t top_k) {
  const char* op = "token_choice_backward";
  const Choice c{output<float>(op, "daffinity", daffinity, rows * choices),
                 input<float>(op, "dweights", dweights, rows * choices),
                 input<float>(op, "affinity", affinity, rows * choices),
                 input<float>(op, "weights", weights, rows * choices),
                 rows,
                 choices,
                 top_k};
  if (rows == 0) return;
  choose_backward_kernel<<<blocks_for(rows, kThreads), kThreads, 0, stream()>>>(c);
  check_launch(op);
}

void CudaBackend::expert_fill(View rows, View slots, ConstView weights, std::int64_t seq,
                              const ExpertShape& s) {
  const char* op = "expert_fill";
  check_sequences(op, s.rows, seq);
  auto* row_of = output<std::int32_t>(op, "rows", rows, s.experts * s.slots);
  auto* slot_of = output<std::int32_t>(op, "slots", slots, s.experts * s.rows);
  const auto* chosen = input<float>(op, "weights", weights, s.experts * s.rows);
  if (s.rows == 0 || s.experts == 0) return;
  const std::int64_t sequences = s.rows / seq;
  if (s.slots % sequences != 0) fail(op, "slots", s.slots, sequences);
  if (s.experts * s.slots > 0x7fffffff) fail(op, "E * S", s.experts * s.slots, 0x7fffffff);
  const Fill f{row_of,
               slot_of,
               chosen,
               s.rows,
               static_cast<int>(sequences),
               static_cast<int>(seq),
               static_cast<int>(s.slots / sequences)};
  fill_kernel<<<static_cast<unsigned>(s.experts * sequences), kThreads, 0, stream()>>>(f);
  check_launch(op);
}

void CudaBackend::balance_loss(View losses, View daffinity, ConstView affinity, ConstView weights,
                               const SequenceChoices& s, double gradient_scale) {
  const char* op = "balance_loss";
  check_sequences(op, s.rows, s.seq);
  const std::int64_t all = s.rows * s.choices;
  const Balance a{output<float>(op, "losses", losses, s.rows / s.seq),
                  optional_output<float>(op, "daffinity", daffinity, all),
                  input<float>(op, "affinity", affinity, all),
                  input<float>(op, "weights", weights, all),
                  s,
                  static_cast<float>(gradient_scale)};
  if (s.rows == 0) return;
  balance_kernel<<<static_cast<unsigned>(s.rows / s.seq), kThreads, 0, stream()>>>(a);
  check_launch(op);
}

void CudaBackend::square_loss(View losses, View dx, ConstView x, double gradient_scale) {
  const char* op = "square_loss";
  float* to = output<float>(op, "losses", losses, x.size);
  float* gradient = optional_output<float>(op, "dx", dx, x.size);
  const float* from = input<float>(op, "x", x, x.size);
  if (x.size == 0) return;
  square_kernel<<<blocks_for(x.size, kThreads), kThreads, 0, stream()>>>(
      to, gradient, from, x.size, static_cast<float>(2 * gradient_scale));
  check_launch(op);
}

}  // namespace fathom::cuda
