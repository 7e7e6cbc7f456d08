// Attention by rows: one warp a query (or a key) and head, in fp32, for any dtype and head size.
//
// Row-invariance: a query's keys are taken 32 at a time from its first key on, and within a group lane by
// lane, so its result depends on its own keys and their order only: not on its index, the batch, or later
// tokens.
#include "kernels/cuda/attention.h"
#include "kernels/cuda/device/launch.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/row_dot.cuh"
#include "kernels/cuda/device/vector.cuh"

namespace fathom::cuda {

namespace {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

/// The row (of B*T) and the head that a warp works on, of `heads` in a row.
struct WarpRow {
  std::int64_t row;
  std::int64_t head;
  std::int64_t b;
  std::int64_t t;
  bool valid;

  __device__ __forceinline__ WarpRow(const AttentionShape& s, std::int64_t heads) {
    const std::int64_t item = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
    row = item / heads;
    head = item % heads;
    b = row / s.seq;
    t = row % s.seq;
    valid = row < s.batch * s.seq;
  }
};

/// A warp's vector in shared memory, as floats.
template <typename T>
__device__ __forceinline__ void load_vector(float* to, const T* from, int n) {
  for (int e = static_cast<int>(threadIdx.x) % 32; e < n; e += 32) to[e] = to_float(from[e]);
  __syncwarp();
}

/// Elements lane, lane + 32, ... of a row: what a lane has of a sum of rows.
template <int kParts>
struct RowSum {
  float v[kParts] = {};

  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) v[i] *= factor;
  }
  /// Adds the rows from `rows` on, `count` of them (at most 32), row j times lane j's weight.
  template <typename T>
  __device__ __forceinline__ void add(const T* rows, std::int64_t stride, int count, int n, float weight) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    for (int j = 0; j < count; ++j) {
      const float w = __shfl_sync(kFullWarp, weight, j);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const int e = lane + 32 * i;
        if (e < n) v[i] = fmaf(w, to_float(rows[j * stride + e]), v[i]);
      }
    }
  }
  template <typename T>
  __device__ __forceinline__ void store(T* to, int n, float factor) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      if (lane + 32 * i < n) to[lane + 32 * i] = from_float<T>(v[i] * factor);
    }
  }
};

__device__ __forceinline__ std::int64_t row_stride(const AttentionShape& s) {
  return (s.heads + 2 * s.kv_heads) * s.head_dim;
}
__device__ __forceinline__ std::int64_t first_key_of(const std::int32_t* first_key, std::int64_t row) {
  return first_key == nullptr ? 0 : first_key[row];
}

/// Traffic: q and out once; every query reads its keys and values, from the caches when all goes well.
template <typename T, int kParts>
__global__ void __launch_bounds__(kThreads) forward_kernel(const AttentionForward<T> a) {
  __shared__ float vectors[kWarps][32 * kParts];
  const AttentionShape& s = a.shape;
  const WarpRow at(s, s.heads);
  if (!at.valid) return;
  const int d = static_cast<int>(s.head_dim), lane = static_cast<int>(threadIdx.x) % 32;
  const float scale = static_cast<float>(s.scale);
  const std::int64_t stride = row_stride(s), group = at.head / (s.heads / s.kv_heads);
  const T* const sequence = a.qkv + at.b * s.seq * stride;
  const T* const keys = sequence + (s.heads + group) * d;
  const T* const values = keys + s.kv_heads * d;
  float* const q = vectors[threadIdx.x / 32];
  load_vector(q, sequence + at.t * stride + at.head * d, d);

  RowSum<kParts> out;
  float max = -INFINITY, sum = 0.0F;
  for (std::int64_t key = first_key_of(a.first_key, at.row); key <= at.t; key += 32) {
    const int count = static_cast<int>(min(at.t - key + 1, static_cast<std::int64_t>(32)));
    const float score = lane < count ? dot(q, keys + (key + lane) * stride, d) * scale : -INFINITY;
    const float most = fmaxf(max, warp_reduce(score, Max{}));
    const float p = expf(score - most), correction = expf(max - most);
    max = most;
    sum = sum * correction + warp_reduce(p, Sum{});
    out.scale(correction);
    out.add(values + key * stride, stride, count, d, p);
  }
  out.store(a.out + (at.row * s.heads + at.head) * d, d, 1.0F / sum);
  if (lane == 0) a.lse[(at.b * s.heads + at.head) * s.seq + at.t] = max + logf(sum);
}

/// Traffic: out and dout once.
template <typename T>
__global__ void __launch_bounds__(kThreads) delta_kernel(const AttentionBackward<T> a) {
  const AttentionShape& s = a.shape;
  const WarpRow at(s, s.heads);
  if (!at.valid) return;
  const int d = static_cast<int>(s.head_dim), lane = static_cast<int>(threadIdx.x) % 32;
  const T* const out = a.out + (at.row * s.heads + at.head) * d;
  const T* const dout = a.dout + (at.row * s.heads + at.head) * d;
  float sum = 0.0F;
  for (int e = lane; e < d; e += 32) sum = fmaf(to_float(out[e]), to_float(dout[e]), sum);
  sum = warp_reduce(sum, Sum{});
  if (lane == 0) a.delta[(at.b * s.heads + at.head) * s.seq + at.t] = sum;
}

/// dq = scale sum over keys of dS k. Traffic: q, dout and dq once; every query reads its keys and values.
template <typename T, int kParts>
__global__ void __launch_bounds__(kThreads) query_gradients_kernel(const AttentionBackward<T> a) {
  __shared__ float vectors[kWarps][2][32 * kParts];
  const AttentionShape& s = a.shape;
  const WarpRow at(s, s.heads);
  if (!at.valid) return;
  const int d = static_cast<int>(s.head_dim), lane = static_cast<int>(threadIdx.x) % 32;
  const float scale = static_cast<float>(s.scale);
  const std::int64_t stride = row_stride(s), group = at.head / (s.heads / s.kv_heads);
  const std::int64_t query = (at.b * s.seq + at.t) * stride + at.head * d;
  const T* const keys = a.qkv + at.b * s.seq * stride + (s.heads + group) * d;
  const T* const values = keys + s.kv_heads * d;
  const std::int64_t statistic = (at.b * s.heads + at.head) * s.seq + at.t;
  const float lse = a.lse[statistic], delta = a.delta[statistic];
  float* const q = vectors[threadIdx.x / 32][0];
  float* const dout = vectors[threadIdx.x / 32][1];
  load_vector(q, a.qkv + query, d);
  load_vector(dout, a.dout + (at.row * s.heads + at.head) * d, d);

  RowSum<kParts> dq;
  for (std::int64_t key = first_key_of(a.first_key, at.row); key <= at.t; key += 32) {
    const int count = static_cast<int>(min(at.t - key + 1, static_cast<std::int64_t>(32)));
    float ds = 0.0F;
    if (lane < count) {
      const std::int64_t offset = (key + lane) * stride;
      ds = expf(dot(q, keys + offset, d) * scale - lse) * (dot(dout, values + offset, d) - delta);
    }
    dq.add(keys + key * stride, stride, count, d, ds);
  }
  dq.store(a.dqkv + query, d, scale);
}

/// dk = scale sum over queries of dS q, dv = sum of P dout. Traffic: k, v, dk and dv once; every key reads
/// the queries that see it, and their gradients.
template <typename T, int kParts>
__global__ void __launch_bounds__(kThreads) key_gradients_kernel(const AttentionBackward<T> a) {
  __shared__ float vectors[kWarps][2][32 * kParts];
  const AttentionShape& s = a.shape;
  const WarpRow at(s, s.kv_heads);
  if (!at.valid) return;
  const int d = static_cast<int>(s.head_dim), lane = static_cast<int>(threadIdx.x) % 32;
  const float scale = static_cast<float>(s.scale);
  const std::int64_t stride = row_stride(s), narrow = s.heads * d, group = s.heads / s.kv_heads;
  const std::int64_t key = (at.b * s.seq + at.t) * stride + (s.heads + at.head) * d,
                     value = key + s.kv_heads * d;
  float* const k = vectors[threadIdx.x / 32][0];
  float* const v = vectors[threadIdx.x / 32][1];
  load_vector(k, a.qkv + key, d);
  load_vector(v, a.qkv + value, d);

  RowSum<kParts> dk, dv;
  for (std::int64_t h = at.head * group; h < (at.head + 1) * group; ++h) {
    const T* const queries = a.qkv + at.b * s.seq * stride + h * d;
    const T* const douts = a.dout + at.b * s.seq * narrow + h * d;
    const float* const lse = a.lse + (at.b * s.heads + h) * s.seq;
    const float* const delta = a.delta + (at.b * s.heads + h) * s.seq;
    for (std::int64_t query = at.t; query < s.seq; query += 32) {
      // First keys do not decrease: once a document begins after this key, no later query sees it.
      if (first_key_of(a.first_key, at.b * s.seq + query) > at.t) break;
      const int count = static_cast<int>(min(s.seq - query, static_cast<std::int64_t>(32)));
      float p = 0.0F, ds = 0.0F;
      if (lane < count && first_key_of(a.first_key, at.b * s.seq + query + lane) <= at.t) {
        const std::int64_t i = query + lane;
        p = expf(dot(k, queries + i * stride, d) * scale - lse[i]);
        ds = p * (dot(v, douts + i * narrow, d) - delta[i]);
      }
      dv.add(douts + query * narrow, narrow, count, d, p);
      dk.add(queries + query * stride, stride, count, d, ds);
    }
  }
  dk.store(a.dqkv + key, d, scale);
  dv.store(a.dqkv + value, d, 1.0F);
}

LaunchSize row_launch(const AttentionShape& s, std::int64_t heads) {
  return {blocks_for(s.batch * s.seq * heads, kWarps), kThreads, 0};
}

template <typename T, int kParts>
void run(const AttentionForward<T>& a, cudaStream_t stream) {
  launch("attention_forward", forward_kernel<T, kParts>, row_launch(a.shape, a.shape.heads), stream, a);
}
template <typename T, int kParts>
void run(const AttentionBackward<T>& a, cudaStream_t stream) {
  launch("attention_backward", query_gradients_kernel<T, kParts>, row_launch(a.shape, a.shape.heads), stream,
         a);
  launch("attention_backward", key_gradients_kernel<T, kParts>, row_launch(a.shape, a.shape.kv_heads), stream,
         a);
}

/// run<T, n>: n times 32 elements hold a head.
template <typename T, typename Arguments>
void run_for_head_dim(const char* op, const Arguments& a, cudaStream_t stream) {
  const std::int64_t d = a.shape.head_dim;
  if (d <= 32) {
    run<T, 1>(a, stream);
  } else if (d <= 64) {
    run<T, 2>(a, stream);
  } else if (d <= 128) {
    run<T, 4>(a, stream);
  } else if (d <= kMaxRowHeadDim) {
    run<T, 8>(a, stream);
  } else {
    fail(op, "head_dim above what the kernels hold", d, kMaxRowHeadDim);
  }
}

}  // namespace

template <typename T>
void attend_rows(const AttentionForward<T>& a, cudaStream_t stream) {
  run_for_head_dim<T>("attention_forward", a, stream);
}
template void attend_rows(const AttentionForward<float>&, cudaStream_t);
template void attend_rows(const AttentionForward<bf16>&, cudaStream_t);

template <typename T>
void attention_delta(const AttentionBackward<T>& a, cudaStream_t stream) {
  launch("attention_backward", delta_kernel<T>, row_launch(a.shape, a.shape.heads), stream, a);
}
template void attention_delta(const AttentionBackward<float>&, cudaStream_t);
template void attention_delta(const AttentionBackward<bf16>&, cudaStream_t);

template <typename T>
void attend_rows_backward(const AttentionBackward<T>& a, cudaStream_t stream) {
  attention_delta(a, stream);
  run_for_head_dim<T>("attention_backward", a, stream);
}
template void attend_rows_backward(const AttentionBackward<float>&, cudaStream_t);
template void attend_rows_backward(const AttentionBackward<bf16>&, cudaStream_t);

}  // namespace fathom::cuda
