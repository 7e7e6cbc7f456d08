// RMSNorm of every query and key head, then RoPE (rope.cu).
//
// The norm's backward is that of norm.cu for each head, on the gradient turned back. When a head's half is 1,
// 2, 4, ... or 32 packs of 16 bytes, that many neighbouring lanes hold a head, each a pack of either half:
// memory sees each element once. Other heads take a warp each, and two passes.
#include "kernels/cuda/check.h"
#include "kernels/cuda/device/mma.cuh"
#include "kernels/cuda/device/reduce.cuh"
#include "kernels/cuda/device/rotation.cuh"
#include "kernels/cuda/device/row_packs.cuh"
#include "kernels/cuda/qk_norm_rope.h"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBackwardBlocks = 2;  // of a multiprocessor: what the registers allow
constexpr int kStages = 3;  // items of a thread, 64 bytes each, that the backward has in shared memory

struct Sizes {
  std::int64_t rows;
  int rows_per_block;
  int queries;  // heads
  int turned;   // heads of queries and keys
  int heads;    // all, with the values
  int head_dim;
  int row_size;  // elements
  float eps;
};

Sizes sizes_of(const QkvShape& s) {
  const int half = static_cast<int>(s.head_dim / 2);
  return {s.rows,
          half >= kThreads ? 1 : kThreads / half,
          static_cast<int>(s.heads),
          static_cast<int>(s.heads + s.kv_heads),
          static_cast<int>(s.heads + 2 * s.kv_heads),
          static_cast<int>(s.head_dim),
          static_cast<int>(s.row_size()),
          static_cast<float>(s.norm_eps)};
}

/// Which part of which head a thread has in a block's rows: item = (row * heads + head) * packs + pack.
struct Place {
  int row, head, first;  // first: element of the half

  __device__ Place(int item, int packs, int heads, int pack_size) {
    const unsigned rest = static_cast<unsigned>(item) / static_cast<unsigned>(packs);
    first = (item - static_cast<int>(rest) * packs) * pack_size;
    row = static_cast<int>(rest / static_cast<unsigned>(heads));
    head = static_cast<int>(rest) - row * heads;
  }
};

/// The sum over aligned groups of `lanes` lanes, a power of two. All lanes of the warp call it.
__device__ __forceinline__ float group_sum(float x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

/// Reads qkv, writes out: 2 * rows * row_size elements.
template <typename T>
__global__ void __launch_bounds__(kThreads) forward_packed(QkNormForward<T> p, Sizes s) {
  constexpr int kN = kPack<T>;
  extern __shared__ float shared[];
  const int half = s.head_dim / 2, packs = half / kN;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * s.rows_per_block;
  const std::int64_t left = s.rows - first;
  const int rows = left < s.rows_per_block ? static_cast<int>(left) : s.rows_per_block;
  RotationTable table(shared, s.rows_per_block, half);
  table.make(p.positions + first, p.frequencies, rows, half);
  __syncthreads();
  const int items = rows * s.heads * packs;
  for (int base = 0; base < items; base += kThreads) {  // the same for all threads: they sum together
    const int item = base + static_cast<int>(threadIdx.x);
    const bool active = item < items;
    const Place place(item, packs, s.heads, kN);
    const std::int64_t at = (first + place.row) * s.row_size + place.head * s.head_dim + place.first;
    const uint4 raw_a = active ? load_raw(p.qkv + at) : uint4{};
    const uint4 raw_b = active ? load_raw(p.qkv + at + half) : uint4{};
    Pack<T> a = unpack<T>(raw_a), b = unpack<T>(raw_b);
    float squares = 0;
#pragma unroll
    for (int e = 0; e < kN; ++e) squares += a.v[e] * a.v[e] + b.v[e] * b.v[e];
    squares = group_sum(squares, packs);
    if (!active) continue;
    if (place.head >= s.turned) {
      store_raw(p.out + at, raw_a);
      store_raw(p.out + at + half, raw_b);
      continue;
    }
    const float reciprocal = 1.0F / sqrtf(squares / static_cast<float>(s.head_dim) + s.eps);
    if (place.first == 0) p.rstd[(first + place.row) * s.turned + place.head] = reciprocal;
    const float* weight = (place.head < s.queries ? p.q_weight : p.k_weight) + place.first;
    const int angle = place.row * half + place.first;
    float wa[kN], wb[kN], cosines[kN], sines[kN];
    load_floats(wa, weight);
    load_floats(wb, weight + half);
    load_floats(cosines, table.cosines + angle);
    load_floats(sines, table.sines + angle);
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      a.v[e] = a.v[e] * reciprocal * wa[e];
      b.v[e] = b.v[e] * reciprocal * wb[e];
      rotate(a.v[e], b.v[e], cosines[e], sines[e]);
    }
    store_raw(p.out + at, repack(a));
    store_raw(p.out + at + half, repack(b));
  }
}

/// A warp's lanes with the same pack add their sums, then the block's warps in order: into partial [d].
template <int kN>
__device__ void add_weight_sums(float* partial, float* shared, const float (&sums)[2][kN], int packs,
                                int half) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      float sum = sums[h][e];
      for (int offset = packs; offset < 32; offset *= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
      if (lane < packs) shared[(warp * 2 + h) * half + lane * kN + e] = sum;
    }
  }
  __syncthreads();
  for (int j = static_cast<int>(threadIdx.x); j < 2 * half; j += kThreads) {
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared[w * 2 * half + j];
    partial[j] = total;
  }
  __syncthreads();
}

/// sums += (a xa, b xb) factor.
template <typename T>
__device__ __forceinline__ void add_products(float (&sums)[2][kPack<T>], const Pack<T>& a, const Pack<T>& b,
                                             const Pack<T>& xa, const Pack<T>& xb, float factor) {
#pragma unroll
  for (int e = 0; e < kPack<T>; ++e) {
    sums[0][e] += a.v[e] * xa.v[e] * factor;
    sums[1][e] += b.v[e] * xb.v[e] * factor;
  }
}

/// Walks over the items of a block's groups of rows, kThreads at a time; groups lie `stride` rows apart.
struct Walk {
  std::int64_t first;  // row of the group
  int base;            // item of the group

  __device__ void advance(int items_of_group, std::int64_t stride) {
    base += kThreads;
    if (base < items_of_group) return;
    base = 0;
    first += stride;
  }
};

/// Reads dout and qkv, writes dqkv: 3 * rows * row_size elements (2 of the values). Blocks walk over groups
/// of rows; a thread's pack is the same in all of them, since packs divides the number of threads. What a
/// thread needs of the next two items is on its way to shared memory while it computes one.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks) backward_packed(QkNormBackward<T> p, Sizes s) {
  constexpr int kN = kPack<T>;
  extern __shared__ __align__(16) float shared[];
  const int half = s.head_dim / 2, packs = half / kN;
  uint4* const stages = reinterpret_cast<uint4*>(shared) + threadIdx.x;  // [kStages, 4, kThreads]
  float* const room = shared + kStages * 4 * kThreads * 4;
  RotationTable table(room, s.rows_per_block, half);
  float dq[2][kN] = {}, dk[2][kN] = {};
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * s.rows_per_block;
  const int items_of_group = s.rows_per_block * s.heads * packs;
  const auto rows_of = [&](std::int64_t first) {
    const std::int64_t left = s.rows - first;
    return left < s.rows_per_block ? static_cast<int>(left) : s.rows_per_block;
  };
  Walk asked{static_cast<std::int64_t>(blockIdx.x) * s.rows_per_block, 0};
  int to = 0;
  const auto ask = [&] {
    if (asked.first < s.rows) {
      const int item = asked.base + static_cast<int>(threadIdx.x);
      if (item < rows_of(asked.first) * s.heads * packs) {
        const Place place(item, packs, s.heads, kN);
        const std::int64_t at =
            (asked.first + place.row) * s.row_size + place.head * s.head_dim + place.first;
        uint4* const stage = stages + to * 4 * kThreads;
        copy_async(stage, p.dout + at, true);
        copy_async(stage + kThreads, p.dout + at + half, true);
        if (place.head < s.turned) {
          copy_async(stage + 2 * kThreads, p.qkv + at, true);
          copy_async(stage + 3 * kThreads, p.qkv + at + half, true);
        }
      }
      asked.advance(items_of_group, stride);
    }
    to = to + 1 < kStages ? to + 1 : 0;
    commit_copies();
  };
#pragma unroll
  for (int k = 0; k < kStages - 1; ++k) ask();
  int from = 0;
  for (Walk at_work{static_cast<std::int64_t>(blockIdx.x) * s.rows_per_block, 0}; at_work.first < s.rows;
       at_work.advance(items_of_group, stride)) {
    const std::int64_t first = at_work.first;
    const int rows = rows_of(first);
    if (at_work.base == 0) {
      __syncthreads();  // the table of the rows before has been read
      table.make(p.positions + first, p.frequencies, rows, half);
      __syncthreads();
    }
    ask();
    wait_copies<kStages - 1>();
    const uint4* const stage = stages + from * 4 * kThreads;
    from = from + 1 < kStages ? from + 1 : 0;
    const int item = at_work.base + static_cast<int>(threadIdx.x);
    const bool active = item < rows * s.heads * packs;
    const Place place(item, packs, s.heads, kN);
    const bool normed = active && place.head < s.turned;
    const std::int64_t at = (first + place.row) * s.row_size + place.head * s.head_dim + place.first;
    const uint4 raw_a = stage[0], raw_b = stage[kThreads];
    const bool query = place.head < s.queries;
    const float* weight = (query ? p.q_weight : p.k_weight) + place.first;
    Pack<T> a = unpack<T>(raw_a), b = unpack<T>(raw_b), xa{}, xb{};
    float reciprocal = 0, product = 0;
    if (normed) {
      xa = unpack<T>(stage[2 * kThreads]);
      xb = unpack<T>(stage[3 * kThreads]);
      const int angle = place.row * half + place.first;
      reciprocal = p.rstd[(first + place.row) * s.turned + place.head];
      float wa[kN], wb[kN], cosines[kN], sines[kN];
      load_floats(wa, weight);
      load_floats(wb, weight + half);
      load_floats(cosines, table.cosines + angle);
      load_floats(sines, table.sines + angle);
#pragma unroll
      for (int e = 0; e < kN; ++e) {
        rotate(a.v[e], b.v[e], cosines[e], -sines[e]);
        product += a.v[e] * xa.v[e] * wa[e] + b.v[e] * xb.v[e] * wb[e];
      }
      if (query) {
        add_products<T>(dq, a, b, xa, xb, reciprocal);
      } else {
        add_products<T>(dk, a, b, xa, xb, reciprocal);
      }
    }
    product = group_sum(product, packs);
    if (!active) continue;
    if (!normed) {
      store_raw(p.dqkv + at, raw_a);
      store_raw(p.dqkv + at + half, raw_b);
      continue;
    }
    const float pull = reciprocal * reciprocal * reciprocal * (product / static_cast<float>(s.head_dim));
    float wa[kN], wb[kN];
    load_floats(wa, weight);
    load_floats(wb, weight + half);
#pragma unroll
    for (int e = 0; e < kN; ++e) {
      a.v[e] = reciprocal * wa[e] * a.v[e] - pull * xa.v[e];
      b.v[e] = reciprocal * wb[e] * b.v[e] - pull * xb.v[e];
    }
    store_raw(p.dqkv + at, repack(a));
    store_raw(p.dqkv + at + half, repack(b));
  }
  __syncthreads();  // the sums take the table's place
  float* partial = p.weight_partials + static_cast<std::int64_t>(blockIdx.x) * 2 * s.head_dim;
  add_weight_sums(partial, room, dq, packs, half);
  add_weight_sums(partial + s.head_dim, room, dk, packs, half);
}

/// A warp a head, in two passes.
template <typename T>
__global__ void __launch_bounds__(kThreads) forward_any(QkNormForward<T> p, Sizes s) {
  const std::int64_t unit =
      static_cast<std::int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (unit >= s.rows * s.heads) return;
  const std::int64_t row = unit / s.heads;
  const int head = static_cast<int>(unit - row * s.heads), lane = static_cast<int>(threadIdx.x) % 32;
  const int half = s.head_dim / 2;
  const T* from = p.qkv + unit * s.head_dim;
  T* to = p.out + unit * s.head_dim;
  if (head >= s.turned) {
    for (int j = lane; j < s.head_dim; j += 32) to[j] = from[j];
    return;
  }
  float squares = 0;
  for (int j = lane; j < s.head_dim; j += 32) squares += to_float(from[j]) * to_float(from[j]);
  squares = warp_reduce(squares, Sum{});
  const float reciprocal = 1.0F / sqrtf(squares / static_cast<float>(s.head_dim) + s.eps);
  if (lane == 0) p.rstd[row * s.turned + head] = reciprocal;
  const float* w = head < s.queries ? p.q_weight : p.k_weight;
  for (int j = lane; j < half; j += 32) {
    const Rotation r = rotation_at(p.positions[row], p.frequencies[j]);
    float a = to_float(from[j]) * reciprocal * w[j], b = to_float(from[j + half]) * reciprocal * w[j + half];
    rotate(a, b, r.cosine, r.sine);
    to[j] = from_float<T>(a);
    to[j + half] = from_float<T>(b);
  }
}

/// A warp a head, in two passes; the weights' gradients are weight_partials_any's.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward_any(QkNormBackward<T> p, Sizes s) {
  const std::int64_t unit =
      static_cast<std::int64_t>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (unit >= s.rows * s.heads) return;
  const std::int64_t row = unit / s.heads;
  const int head = static_cast<int>(unit - row * s.heads), lane = static_cast<int>(threadIdx.x) % 32;
  const int half = s.head_dim / 2;
  const T* dout = p.dout + unit * s.head_dim;
  const T* x = p.qkv + unit * s.head_dim;
  T* to = p.dqkv + unit * s.head_dim;
  if (head >= s.turned) {
    for (int j = lane; j < s.head_dim; j += 32) to[j] = dout[j];
    return;
  }
  const float reciprocal = p.rstd[row * s.turned + head];
  const float* w = head < s.queries ? p.q_weight : p.k_weight;
  float product = 0;
  for (int j = lane; j < half; j += 32) {
    const Rotation r = rotation_at(p.positions[row], p.frequencies[j]);
    float a = to_float(dout[j]), b = to_float(dout[j + half]);
    rotate(a, b, r.cosine, -r.sine);
    product += a * to_float(x[j]) * w[j] + b * to_float(x[j + half]) * w[j + half];
  }
  product = warp_reduce(product, Sum{});
  const float pull = reciprocal * reciprocal * reciprocal * (product / static_cast<float>(s.head_dim));
  for (int j = lane; j < half; j += 32) {
    const Rotation r = rotation_at(p.positions[row], p.frequencies[j]);
    float a = to_float(dout[j]), b = to_float(dout[j + half]);
    rotate(a, b, r.cosine, -r.sine);
    to[j] = from_float<T>(reciprocal * w[j] * a - pull * to_float(x[j]));
    to[j + half] = from_float<T>(reciprocal * w[j + half] * b - pull * to_float(x[j + half]));
  }
}

/// A thread has elements j and j + d/2 of all heads of the rows blockIdx.x, blockIdx.x + gridDim.x, ...
template <typename T>
__global__ void __launch_bounds__(kThreads) weight_partials_any(QkNormBackward<T> p, Sizes s) {
  const int half = s.head_dim / 2, j = static_cast<int>(blockIdx.y * kThreads + threadIdx.x);
  if (j >= half) return;
  float sums[2][2] = {};  // of queries and keys, of the first and the second half
  for (std::int64_t row = blockIdx.x; row < s.rows; row += gridDim.x) {
    const Rotation r = rotation_at(p.positions[row], p.frequencies[j]);
    for (int head = 0; head < s.turned; ++head) {
      const std::int64_t at = row * s.row_size + static_cast<std::int64_t>(head) * s.head_dim + j;
      const float reciprocal = p.rstd[row * s.turned + head];
      float a = to_float(p.dout[at]), b = to_float(p.dout[at + half]);
      rotate(a, b, r.cosine, -r.sine);
      const float da = a * to_float(p.qkv[at]) * reciprocal, db = b * to_float(p.qkv[at + half]) * reciprocal;
      const bool query = head < s.queries;
      sums[0][0] += query ? da : 0.0F;
      sums[0][1] += query ? db : 0.0F;
      sums[1][0] += query ? 0.0F : da;
      sums[1][1] += query ? 0.0F : db;
    }
  }
  float* partial = p.weight_partials + static_cast<std::int64_t>(blockIdx.x) * 2 * s.head_dim + j;
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    partial[kind * s.head_dim] = sums[kind][0];
    partial[kind * s.head_dim + half] = sums[kind][1];
  }
}

/// Whether a power of two of lanes, at most a warp, can share a head of T.
template <typename T>
bool shares_in_packs(int half) {
  const int lanes = half / kPack<T>;
  return half % kPack<T> == 0 && lanes >= 1 && lanes <= 32 && (lanes & (lanes - 1)) == 0;
}

std::size_t table_bytes(const Sizes& s) {
  return static_cast<std::size_t>(s.rows_per_block) * static_cast<std::size_t>(s.head_dim) * sizeof(float);
}

}  // namespace

std::int64_t qk_norm_partials(int multiprocessors) { return std::int64_t{kBackwardBlocks} * multiprocessors; }

template <typename T>
void qk_norm_rope_forward(const QkNormForward<T>& p, const QkvShape& shape, cudaStream_t stream) {
  const Sizes s = sizes_of(shape);
  if (s.rows == 0 || s.heads == 0) return;
  const int half = s.head_dim / 2;
  if (shares_in_packs<T>(half) && packs<T>(p.qkv, half) && packs<T>(p.out, half) &&
      packs<float>(p.q_weight, half) && packs<float>(p.k_weight, half)) {
    forward_packed<T><<<blocks_for(s.rows, s.rows_per_block), kThreads, table_bytes(s), stream>>>(p, s);
  } else {
    forward_any<T><<<blocks_for(s.rows * s.heads, kWarps), kThreads, 0, stream>>>(p, s);
  }
  check_launch("rope_forward");
}

template <typename T>
std::int64_t qk_norm_rope_backward(const QkNormBackward<T>& p, const QkvShape& shape,
                                   std::int64_t most_partials, cudaStream_t stream) {
  const Sizes s = sizes_of(shape);
  if (s.rows == 0 || s.heads == 0) return 0;
  const int half = s.head_dim / 2;
  const bool packed = shares_in_packs<T>(half) && packs<T>(p.qkv, half) && packs<T>(p.dout, half) &&
                      packs<T>(p.dqkv, half) && packs<float>(p.q_weight, half) &&
                      packs<float>(p.k_weight, half);
  const std::int64_t needed = packed ? blocks_for(s.rows, s.rows_per_block) : s.rows;
  const std::int64_t blocks = needed < most_partials ? needed : most_partials;
  const auto grid = static_cast<unsigned>(blocks);
  if (packed) {
    const std::size_t sums = static_cast<std::size_t>(kWarps * s.head_dim) * sizeof(float);
    const std::size_t shared = kStages * 4 * kThreads * 16 + (table_bytes(s) > sums ? table_bytes(s) : sums);
    check(cudaFuncSetAttribute(backward_packed<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          "rope_backward");
    backward_packed<T><<<grid, kThreads, shared, stream>>>(p, s);
  } else {
    backward_any<T><<<blocks_for(s.rows * s.heads, kWarps), kThreads, 0, stream>>>(p, s);
    weight_partials_any<T><<<dim3(grid, blocks_for(half, kThreads)), kThreads, 0, stream>>>(p, s);
  }
  check_launch("rope_backward");
  return blocks;
}

template void qk_norm_rope_forward(const QkNormForward<float>&, const QkvShape&, cudaStream_t);
template void qk_norm_rope_forward(const QkNormForward<bf16>&, const QkvShape&, cudaStream_t);
template std::int64_t qk_norm_rope_backward(const QkNormBackward<float>&, const QkvShape&, std::int64_t,
                                            cudaStream_t);
template std::int64_t qk_norm_rope_backward(const QkNormBackward<bf16>&, const QkvShape&, std::int64_t,
                                            cudaStream_t);

}  // namespace fathom::cuda
