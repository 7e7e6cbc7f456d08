// The tokens that follow rows of logits: a block of threads a row. First the greatest logit; then, where a
// token is drawn, the sums of exponentials of as many parts of the vocabulary as there are threads, side by
// side, and in the part in whose sum the row's share falls the token. Sums of sums are in double. The share
// of the most likely token, where somebody wants it, is one by such a sum.
#include <vector>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 512;
constexpr int kNobody = 0x7fffffff;

struct Picked {
  double share;
  std::int32_t token;
  std::int32_t finite;
};

template <typename T>
struct Choose {
  const T* logits;
  const double* temperatures;  // and behind them as many shares; of rows at 0: whether their own is wanted
  Picked* picked;
  std::int64_t vocab;
  int rows, choices;
};

/// The greatest of all threads' values, and of equal ones the lowest id; for all threads.
__device__ __forceinline__ void greatest_of_block(float& value, int& id) {
  __shared__ float values[32];
  __shared__ int ids[32];
  const auto better = [&](float v, int i) {
    if (v > value || (v == value && i < id)) value = v, id = i;
  };
#pragma unroll
  for (int across = 16; across > 0; across /= 2) {
    const float v = __shfl_xor_sync(kFullWarp, value, across);
    const int i = __shfl_xor_sync(kFullWarp, id, across);
    better(v, i);
  }
  if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = value, ids[threadIdx.x / 32] = id;
  __syncthreads();
  for (int w = 0; w < kThreads / 32; ++w) better(values[w], ids[w]);
}

/// The sum of all threads' values, for the first one.
__device__ __forceinline__ double sum_of_block(double x) {
  __shared__ double sums[kThreads / 32];
#pragma unroll
  for (int across = 16; across > 0; across /= 2) x += __shfl_xor_sync(kFullWarp, x, across);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kThreads / 32; ++w) total += sums[w];
  return total;
}

/// Traffic: the logits, two or three times, the later ones from the cache.
template <typename T>
__global__ void __launch_bounds__(kThreads) choose_kernel(const Choose<T> a) {
  __shared__ double sums[kThreads];
  __shared__ double left;  // of the share, in the part that it falls in
  __shared__ int part;
  const int row = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  const T* const logits = a.logits + row * a.vocab;
  float most = -INFINITY;
  int best = kNobody, finite = 1;
#pragma unroll 8
  for (int id = thread; id < a.choices; id += kThreads) {
    const float z = to_float(logits[id]);
    if (!isfinite(z)) finite = 0;
    if (z > most) most = z, best = id;
  }
  finite = __syncthreads_and(finite);
  greatest_of_block(most, best);
  const double temperature = a.temperatures[row];
  if (temperature <= 0 || finite == 0) {
    double share = 1;
    if (finite != 0 && a.temperatures[a.rows + row] > 0) {
      double sum = 0;
      for (int id = thread; id < a.choices; id += kThreads)
        sum += exp(static_cast<double>(to_float(logits[id])) - static_cast<double>(most));
      share = 1 / sum_of_block(sum);
    }
    if (thread == 0) a.picked[row] = {share, best == kNobody ? 0 : best, finite};
    return;
  }
  const auto weight = [&](int id) {
    return exp((static_cast<double>(to_float(logits[id])) - static_cast<double>(most)) / temperature);
  };
  const int each = (a.choices + kThreads - 1) / kThreads;
  const int first = min(thread * each, a.choices), end = min(first + each, a.choices);
  double sum = 0;
  for (int id = first; id < end; ++id) sum += weight(id);
  sums[thread] = sum;
  __syncthreads();
  if (thread == 0) {
    double total = 0;
    int last = 0;  // part that anything can come from
    for (int t = 0; t < kThreads; ++t) {
      total += sums[t];
      if (sums[t] > 0) last = t;
    }
    double share = a.temperatures[a.rows + row] * total;
    int t = 0;
    while (t < last && share >= sums[t]) share -= sums[t++];
    part = t;
    left = share;
  }
  __syncthreads();
  if (thread != part) return;
  int found = first;  // rounding may leave a little at the end: then the last one that can come
  double share = left;
  for (int id = first; id < end; ++id) {
    const double w = weight(id);
    if (w <= 0) continue;
    found = id;
    if (share < w) break;
    share -= w;
  }
  a.picked[row] = {1.0, found, 1};
}

}  // namespace

bool CudaBackend::choose_tokens(std::span<TokenPick> picks, ConstView logits, std::int64_t vocab,
                                std::int64_t choices) {
  const char* op = "choose_tokens";
  const auto rows = static_cast<std::int64_t>(picks.size());
  if (rows == 0) return true;
  if (choices < 1 || choices > vocab) fail(op, "choices", choices, vocab);
  std::vector<double> asked;
  for (const TokenPick& p : picks) asked.push_back(p.temperature);
  for (const TokenPick& p : picks) asked.push_back(p.temperature > 0 ? p.uniform : p.wants_share ? 1.0 : 0.0);
  auto* const room = scratch_of<double>(4 * rows);
  copy_from_host(room, asked.data(), asked.size() * sizeof(double));
  auto* const picked = reinterpret_cast<Picked*>(room + 2 * rows);
  static_assert(sizeof(Picked) == 2 * sizeof(double));
  for_compute_type(op, logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Choose<T> a{input<T>(op, "logits", logits, rows * vocab),
                      room,
                      picked,
                      vocab,
                      static_cast<int>(rows),
                      static_cast<int>(choices)};
    launch(op, choose_kernel<T>, {static_cast<unsigned>(rows), kThreads, 0}, stream(), a);
  });
  std::vector<Picked> out(picks.size());
  copy_to_host(out.data(), picked, out.size() * sizeof(Picked));
  for (std::size_t i = 0; i < picks.size(); ++i) {
    picks[i].token = out[i].token;
    picks[i].finite = out[i].finite != 0;
    picks[i].share = out[i].share;
  }
  return true;
}

}  // namespace fathom::cuda
