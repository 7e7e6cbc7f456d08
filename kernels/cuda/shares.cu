// Rows of shares, softmax at a temperature, that stay on the device, and what the host asks of them: the
// share of a token, and a token that is drawn from a row or from what is left of it when another is taken
// off.
//
// All is in fp64, as the host has it: what is drawn differs from the host's draw by the order of sums alone.
// That order is the number of ids' alone, so the same numbers give the same tokens.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cuda/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/vector.cuh"
#include "kernels/shares.h"

namespace fathom::cuda {

namespace {

constexpr int kMakeThreads = 256, kMakeWarps = kMakeThreads / 32;
constexpr int kMostParts = 32;  // of a row: a warp has one each
constexpr int kPartIds = 2048;  // of a part, where a row has no more than kMostParts of these
constexpr int kAskThreads = 1024, kAskWarps = kAskThreads / 32;
constexpr int kAtOnce = 64;  // questions of a launch: they are its arguments

static_assert(kAskWarps == 32, "a warp adds up the sums of all warps");

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

/// What a part of a row found.
struct Part {
  double sum;   // of exp((z - most) / temperature); NaN where a logit is not finite
  float most;   // -infinity: nothing of the part can come
  float empty;  // so that a part is 16 bytes
};

template <typename T>
struct Make {
  double* shares;
  const T* logits;
  Part* found;  // [rows, parts]
  std::int64_t vocab;
  double temperature;
  int choices, parts;
};

/// The ids of a part: `first` may be behind the end.
struct Ids {
  int first, end;
};
__device__ __forceinline__ Ids ids_of(int part, int parts, int choices) {
  const int each = (choices + parts - 1) / parts, first = min(part * each, choices);
  return {first, min(first + each, choices)};
}

/// A block a part of a row: exponentials less the part's own greatest, and their sum. Traffic: the logits,
/// the second time from the cache, and a write of the shares.
template <typename T>
__global__ void __launch_bounds__(kMakeThreads) exponentials_kernel(const Make<T> a) {
  __shared__ float shared[32];
  __shared__ double sums[kMakeWarps];
  const int row = static_cast<int>(blockIdx.x) / a.parts, part = static_cast<int>(blockIdx.x) % a.parts;
  const int thread = static_cast<int>(threadIdx.x);
  const Ids ids = ids_of(part, a.parts, a.choices);
  const T* const logits = a.logits + row * a.vocab;
  double* const shares = a.shares + static_cast<std::int64_t>(row) * a.choices;
  float most = -INFINITY;
  int finite = 1;
  for (int id = ids.first + thread; id < ids.end; id += kMakeThreads) {
    const float z = to_float(logits[id]);
    if (!(z < INFINITY)) finite = 0;
    most = fmaxf(most, z);
  }
  finite = __syncthreads_and(finite);
  most = block_reduce(most, Max{}, shared);
  double sum = 0;
  if (finite != 0 && most > -INFINITY) {
    for (int id = ids.first + thread; id < ids.end; id += kMakeThreads) {
      const double z = to_float(logits[id]);
      const double e = exp((z - static_cast<double>(most)) / a.temperature);
      shares[id] = e;
      sum += e;
    }
  } else {
    for (int id = ids.first + thread; id < ids.end; id += kMakeThreads) shares[id] = 0.0;
  }
  sum = warp_sum(sum);
  if (thread % 32 == 0) sums[thread / 32] = sum;
  __syncthreads();
  if (thread != 0) return;
  double all = 0;
  for (int w = 0; w < kMakeWarps; ++w) all += sums[w];
  a.found[blockIdx.x] = {finite != 0 ? all : static_cast<double>(NAN), most, 0.0F};
}

/// A block a part of a row: every block knows from all parts what its own exponentials are to be multiplied
/// by. Traffic: a read and a write of the shares, from and to the cache.
template <typename T>
__global__ void __launch_bounds__(kMakeThreads) divide_kernel(const Make<T> a) {
  __shared__ double factor;
  const int row = static_cast<int>(blockIdx.x) / a.parts, part = static_cast<int>(blockIdx.x) % a.parts;
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < 32) {
    const Part mine = thread < a.parts ? a.found[row * a.parts + thread] : Part{0.0, -INFINITY, 0.0F};
    const float most = warp_reduce(mine.most, Max{});
    const bool can_come = mine.most > -INFINITY, bad = __any_sync(kFullWarp, isnan(mine.sum)) != 0;
    const double scale =
        can_come ? exp((static_cast<double>(mine.most) - static_cast<double>(most)) / a.temperature) : 0.0;
    const double total = warp_sum(can_come ? mine.sum * scale : 0.0);
    const double own = __shfl_sync(kFullWarp, scale, part);
    if (thread == 0) factor = !bad && total > 0.0 ? own / total : static_cast<double>(NAN);
  }
  __syncthreads();
  const Ids ids = ids_of(part, a.parts, a.choices);
  double* const shares = a.shares + static_cast<std::int64_t>(row) * a.choices;
  for (int id = ids.first + thread; id < ids.end; id += kMakeThreads) shares[id] *= factor;
}

struct Question {
  const double* p;
  const double* q;  // null: none
  double uniform;
  int certain, id;
};
struct Answer {
  double share;
  int token, finite;
};
struct Ask {
  Question questions[kAtOnce];
  Answer* answers;
  int choices;
};

/// Of the lanes up to and with this one.
__device__ __forceinline__ double scan(double sum, int lane) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const double other = __shfl_up_sync(kFullWarp, sum, offset);
    if (lane >= offset) sum += other;
  }
  return sum;
}

/// A block a question. For a draw each warp adds up the weights of its part of the row, and the warp in whose
/// sum the share falls walks through its part again. Traffic: a row or two, from the cache.
__global__ void __launch_bounds__(kAskThreads) ask_kernel(const __grid_constant__ Ask a) {
  __shared__ double sums[kAskWarps];
  __shared__ double left;  // of the share, in the part that it falls in
  __shared__ int part;
  const Question& asked = a.questions[blockIdx.x];
  const double *const p = asked.p, *q = asked.q;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  // All threads of the block see the same, and go together.
  const bool finite = !isnan(p[0]);
  if (!finite || asked.uniform < 0) {
    if (thread == 0)
      a.answers[blockIdx.x] = {finite && asked.id >= 0 ? p[asked.id] : 0.0, -1, finite ? 1 : 0};
    return;
  }
  int certain = asked.certain;
  const auto weight = [&](int id) {
    if (id == certain) return 0.0;
    return q == nullptr ? p[id] : fmax(0.0, p[id] - q[id]);
  };
  const Ids ids = ids_of(warp, kAskWarps, a.choices);
  double total = 0;
  for (int attempt = 0; attempt < 2; ++attempt) {
    double sum = 0;
    for (int id = ids.first + lane; id < ids.end; id += 32) sum += weight(id);
    sum = warp_sum(sum);
    if (lane == 0) sums[warp] = sum;
    __syncthreads();
    total = warp_sum(sums[lane]);
    if (total > 0) break;
    __syncthreads();  // nobody reads these sums any more
    q = nullptr;
    certain = -1;
  }
  if (thread == 0) {
    int last = 0;  // part that anything can come from: rounding may leave a little behind it
    for (int w = 0; w < kAskWarps; ++w) {
      if (sums[w] > 0) last = w;
    }
    double share = asked.uniform * total;
    int w = 0;
    while (w < last && share >= sums[w]) share -= sums[w++];
    part = w;
    left = share;
  }
  __syncthreads();
  if (warp != part) return;
  double before = 0;
  int token = ids.first;  // the last one that can come, until one is found
  for (int base = ids.first; base < ids.end; base += 32) {
    const int id = base + lane;
    const double w = id < ids.end ? weight(id) : 0.0, up_to = scan(w, lane);
    const unsigned found = __ballot_sync(kFullWarp, w > 0 && left < before + up_to);
    const unsigned any = __ballot_sync(kFullWarp, w > 0);
    if (found != 0) {
      token = base + __ffs(static_cast<int>(found)) - 1;
      break;
    }
    if (any != 0) token = base + 31 - __clz(static_cast<int>(any));
    before += __shfl_sync(kFullWarp, up_to, 31);
  }
  if (lane == 0) a.answers[blockIdx.x] = {p[asked.id >= 0 ? asked.id : token], token, 1};
}

}  // namespace

void CudaBackend::make_shares(View shares, ConstView logits, std::int64_t rows, std::int64_t vocab,
                              std::int64_t choices, double temperature) {
  const char* op = "make_shares";
  if (choices < 1 || choices > vocab) fail(op, "choices", choices, vocab);
  if (!(temperature > 0) || !std::isfinite(temperature)) fail(op, "temperature above 0", 0, 1);
  auto* to = output<double>(op, "shares", shares, rows * choices);
  const int parts = static_cast<int>(std::min<std::int64_t>(blocks_for(choices, kPartIds), kMostParts));
  for_compute_type(op, logits.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* from = input<T>(op, "logits", logits, rows * vocab);
    if (rows == 0) return;
    const Make<T> a{to,   from, scratch_of<Part>(rows * parts), vocab, temperature, static_cast<int>(choices),
                    parts};
    const LaunchSize size{static_cast<unsigned>(rows * parts), kMakeThreads, 0};
    launch(op, exponentials_kernel<T>, size, stream(), a);
    launch(op, divide_kernel<T>, size, stream(), a);
  });
}

void CudaBackend::ask_shares(std::span<ShareQuestion> questions, std::int64_t choices) {
  const char* op = "ask_shares";
  check_questions(questions, choices);
  if (questions.empty()) return;
  auto* const answers = scratch_of<Answer>(std::ssize(questions));
  for (std::size_t first = 0; first < questions.size(); first += kAtOnce) {
    Ask a{};
    const std::size_t n = std::min<std::size_t>(questions.size() - first, kAtOnce);
    for (std::size_t i = 0; i < n; ++i) {
      const ShareQuestion& q = questions[first + i];
      a.questions[i] = {static_cast<const double*>(q.p.data), static_cast<const double*>(q.q.data), q.uniform,
                        q.certain, q.id};
    }
    a.answers = answers + first;
    a.choices = static_cast<int>(choices);
    launch(op, ask_kernel, {static_cast<unsigned>(n), kAskThreads, 0}, stream(), a);
  }
  std::vector<Answer> told(questions.size());
  copy_to_host(told.data(), answers, told.size() * sizeof(Answer));
  for (std::size_t i = 0; i < told.size(); ++i) {
    questions[i].share = told[i].share;
    questions[i].token = told[i].token;
    questions[i].finite = told[i].finite != 0;
  }
}

}  // namespace fathom::cuda
