// RoPE (Su et al. 2021), half-split: element j of a head's first half turns with element j + d/2. The
// rotation's transpose is its inverse, which is what the backward applies. With QK-norm: qk_norm_rope.cu.
//
// A block takes as many rows as make about 256 angles, computes their sines and cosines once, and turns all
// heads of these rows with them. Positions are not checked here: they are not negative.
#include <cmath>
#include <vector>

#include "kernels/cuda/check.h"
#include "kernels/cuda/column_sums.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/order.cuh"
#include "kernels/cuda/device/rotation.cuh"
#include "kernels/cuda/device/vector.cuh"
#include "kernels/cuda/qk_norm_rope.h"

namespace fathom::cuda {

namespace {

constexpr int kThreads = 256;

template <typename T>
struct Turn {
  T* out;
  const T* in;
  const std::int32_t* positions;
  const float* frequencies;
  std::int64_t rows;
  int rows_per_block;
  int head_dim;
  int turned;       // query and key heads
  int heads;        // those that the kernel visits: also the values, when they must be copied
  int row_size;     // elements
  float direction;  // 1, or -1 to turn back
};

/// Reads and writes 2 * rows * heads * head_dim elements: when in place, queries and keys alone.
template <typename T, int kN>
__global__ void __launch_bounds__(kThreads) turn_heads(Turn<T> p) {
  using P = Pack<T, kN>;
  extern __shared__ float shared[];
  const int half = p.head_dim / 2;
  const std::int64_t first = static_cast<std::int64_t>(last_part_first()) * p.rows_per_block;
  const std::int64_t left = p.rows - first;
  const int rows = left < p.rows_per_block ? static_cast<int>(left) : p.rows_per_block;
  RotationTable table(shared, p.rows_per_block, half);
  table.make(p.positions + first, p.frequencies, rows, half);
  __syncthreads();
  const unsigned packs = static_cast<unsigned>(half / kN), heads = static_cast<unsigned>(p.heads);
  const unsigned items = static_cast<unsigned>(rows) * heads * packs;
#pragma unroll 2
  for (unsigned item = threadIdx.x; item < items; item += kThreads) {
    const unsigned rest = item / packs, j = (item - rest * packs) * kN;
    const unsigned row = rest / heads, head = rest - row * heads;
    const std::int64_t at = (first + row) * p.row_size + head * static_cast<unsigned>(p.head_dim) + j;
    P a = P::load(p.in + at), b = P::load(p.in + at + half);
    if (head < static_cast<unsigned>(p.turned)) {
      const auto cosines = Pack<float, kN>::load(table.cosines + row * half + j);
      const auto sines = Pack<float, kN>::load(table.sines + row * half + j);
#pragma unroll
      for (int e = 0; e < kN; ++e) rotate(a.v[e], b.v[e], cosines.v[e], p.direction * sines.v[e]);
    }
    a.store(p.out + at);
    b.store(p.out + at + half);
  }
}

template <typename T>
void launch(cudaStream_t stream, const char* op, Turn<T> p, const QkvShape& s) {
  if (s.rows == 0 || s.row_size() == 0) return;
  const int half = static_cast<int>(s.head_dim / 2);
  p.rows = s.rows;
  p.rows_per_block = half >= kThreads ? 1 : kThreads / half;
  p.head_dim = static_cast<int>(s.head_dim);
  p.turned = static_cast<int>(s.heads + s.kv_heads);
  p.heads = static_cast<int>(p.in == p.out ? s.heads + s.kv_heads : s.heads + 2 * s.kv_heads);
  p.row_size = static_cast<int>(s.row_size());
  const unsigned grid = blocks_for(s.rows, p.rows_per_block);
  const std::size_t table = static_cast<std::size_t>(2 * p.rows_per_block * half) * sizeof(float);
  if (half % kPack<T> == 0 && packs<T>(p.in, half) && packs<T>(p.out, half)) {
    turn_heads<T, kPack<T>><<<grid, kThreads, table, stream>>>(p);
  } else {
    turn_heads<T, 1><<<grid, kThreads, table, stream>>>(p);
  }
  check_launch(op);
}

void check_shape(const char* op, const QkvShape& s, ConstView q_weight, ConstView k_weight) {
  constexpr std::int64_t kMost = 4096;  // a row of sines and cosines must fit a block's shared memory
  if (s.head_dim < 2 || s.head_dim % 2 != 0) fail(op, "head_dim, which must be even", s.head_dim, 2);
  if (s.head_dim > kMost) fail(op, "head_dim, which is bounded", s.head_dim, kMost);
  if (q_weight && !k_weight) fail_null(op, "k_weight");
  if (k_weight && !q_weight) fail_null(op, "q_weight");
}

}  // namespace

const float* CudaBackend::rope_frequencies(const QkvShape& s) {
  const std::tuple key{s.rope_theta, s.head_dim, s.rope_scaling};
  if (const auto found = rope_tables_.find(key); found != rope_tables_.end()) {
    return static_cast<const float*>(found->second.get());
  }
  if (capturing_) throw InternalError("[rope] a new theta, head size or scaling within a captured sequence");
  // Exponent and frequency are rounded as an fp32 implementation rounds them; the power itself is in double.
  std::vector<float> frequencies(static_cast<std::size_t>(s.head_dim / 2));
  for (std::size_t i = 0; i < frequencies.size(); ++i) {
    const float exponent = -2.0F * static_cast<float>(i) / static_cast<float>(s.head_dim);
    const double frequency = std::pow(s.rope_theta, static_cast<double>(exponent));
    frequencies[i] = static_cast<float>(scaled_frequency(frequency, s.rope_scaling));
  }
  const std::size_t bytes = frequencies.size() * sizeof(float);
  DeviceMemory table = make_device_memory("rope", bytes);
  copy_from_host(table.get(), frequencies.data(), bytes);
  return static_cast<const float*>(rope_tables_.emplace(key, std::move(table)).first->second.get());
}

void CudaBackend::rope_forward(View out, View rstd, ConstView qkv, ConstView positions, ConstView q_weight,
                               ConstView k_weight, const QkvShape& s) {
  const char* op = "rope_forward";
  check_shape(op, s, q_weight, k_weight);
  const std::int64_t n = s.rows * s.row_size(), turned = s.heads + s.kv_heads;
  const float* frequencies = rope_frequencies(s);
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>(op, "out", out, n);
    const T* from = input<T>(op, "qkv", qkv, n);
    const auto* at = input<std::int32_t>(op, "positions", positions, s.rows);
    if (!q_weight) {
      Turn<T> p{};
      p.out = to, p.in = from, p.positions = at, p.frequencies = frequencies, p.direction = 1.0F;
      launch(stream_, op, p, s);
      return;
    }
    qk_norm_rope_forward<T>({to, output<float>(op, "rstd", rstd, s.rows * turned), from, at, frequencies,
                             input<float>(op, "q_weight", q_weight, s.head_dim),
                             input<float>(op, "k_weight", k_weight, s.head_dim)},
                            s, stream_);
  });
}

void CudaBackend::rope_backward(View dqkv, View dq_weight_accumulate, View dk_weight_accumulate,
                                ConstView dout, ConstView qkv, ConstView rstd, ConstView positions,
                                ConstView q_weight, ConstView k_weight, const QkvShape& s) {
  const char* op = "rope_backward";
  check_shape(op, s, q_weight, k_weight);
  const std::int64_t n = s.rows * s.row_size(), turned = s.heads + s.kv_heads, d = s.head_dim;
  const float* frequencies = rope_frequencies(s);
  for_compute_type(op, dqkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>(op, "dqkv", dqkv, n);
    const T* from = input<T>(op, "dout", dout, n);
    const auto* at = input<std::int32_t>(op, "positions", positions, s.rows);
    if (!q_weight) {
      Turn<T> p{};
      p.out = to, p.in = from, p.positions = at, p.frequencies = frequencies, p.direction = -1.0F;
      launch(stream_, op, p, s);
      return;
    }
    auto* dq_weight = output<float>(op, "dq_weight", dq_weight_accumulate, d);
    auto* dk_weight = output<float>(op, "dk_weight", dk_weight_accumulate, d);
    const std::int64_t most = qk_norm_partials(multiprocessors_);
    auto* partials = scratch_of<float>(most * 2 * d);
    const std::int64_t count = qk_norm_rope_backward<T>(
        {to, partials, from, input<T>(op, "qkv", qkv, n), input<float>(op, "rstd", rstd, s.rows * turned), at,
         frequencies, input<float>(op, "q_weight", q_weight, d), input<float>(op, "k_weight", k_weight, d)},
        s, most, stream_);
    add_column_sums(op, {dq_weight, partials, count, d, 2 * d}, stream_);
    add_column_sums(op, {dk_weight, partials + d, count, d, 2 * d}, stream_);
  });
}

}  // namespace fathom::cuda
