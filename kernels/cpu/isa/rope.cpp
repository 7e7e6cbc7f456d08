// RoPE (Su et al. 2021), half-split, with RMSNorm on every query and key head before it when weights are
// given.
//
// Element i of a head's first half turns with element i + d/2. The rotation's transpose is its inverse, which
// is what the backward applies; the norm's backward is that of norm.cpp for each head.
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/vector_math.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

template <typename T>
FATHOM_INLINE void rotate(T* out, const T* in, const T* cosines, const T* sines, std::int64_t half) {
#pragma omp simd
  for (std::int64_t j = 0; j < half; ++j) {
    const T a = in[j], b = in[j + half];
    out[j] = a * cosines[j] - b * sines[j];
    out[j + half] = b * cosines[j] + a * sines[j];
  }
}

template <typename T>
FATHOM_INLINE void rotate_back(T* out, const T* in, const T* cosines, const T* sines, std::int64_t half) {
#pragma omp simd
  for (std::int64_t j = 0; j < half; ++j) {
    const T a = in[j], b = in[j + half];
    out[j] = a * cosines[j] + b * sines[j];
    out[j + half] = b * cosines[j] - a * sines[j];
  }
}

template <typename T>
FATHOM_INLINE void copy_elements(T* out, const T* in, std::int64_t n) {
  if (out == in) return;
#pragma omp simd
  for (std::int64_t j = 0; j < n; ++j) out[j] = in[j];
}

template <typename T>
void forward(T* out, T* rstd, const T* qkv, const std::int32_t* positions, const T* q_weight,
             const T* k_weight, const QkvShape& s, const RopeTable<T>& table) {
  const std::int64_t d = s.head_dim, half = d / 2, turned = s.heads + s.kv_heads, row_size = s.row_size();
  const std::int64_t queries = s.heads, values = s.kv_heads * d;
  const T eps = static_cast<T>(s.norm_eps);
  parallel_for(s.rows, row_grain(row_size), [=, &table](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const T* from = qkv + i * row_size;
      T* to = out + i * row_size;
      const T* cosines = table.cosines(positions[i]);
      const T* sines = table.sines(positions[i]);
      for (std::int64_t h = 0; h < turned; ++h, from += d, to += d) {
        if (q_weight == nullptr) {
          rotate(to, from, cosines, sines, half);
          continue;
        }
        T squares = 0;
#pragma omp simd reduction(+ : squares)
        for (std::int64_t j = 0; j < d; ++j) squares += from[j] * from[j];
        const T reciprocal = T(1) / vsqrt(squares / static_cast<T>(d) + eps);
        rstd[i * turned + h] = reciprocal;
        const T* w = h < queries ? q_weight : k_weight;
#pragma omp simd
        for (std::int64_t j = 0; j < d; ++j) to[j] = from[j] * reciprocal * w[j];
        rotate(to, to, cosines, sines, half);
      }
      copy_elements(to, from, values);
    }
  });
}

template <typename T>
void backward(T* dqkv, T* dq_weight, T* dk_weight, const T* dout, const T* qkv, const T* rstd,
              const std::int32_t* positions, const T* q_weight, const T* k_weight, const QkvShape& s,
              const RopeTable<T>& table) {
  const std::int64_t d = s.head_dim, half = d / 2, turned = s.heads + s.kv_heads, row_size = s.row_size();
  const std::int64_t queries = s.heads, values = s.kv_heads * d;
  const bool normed = q_weight != nullptr;
  RowSums<T> sums(s.rows, normed ? 2 * d : 0);
  const std::int64_t grain = normed ? sums.grain() : row_grain(row_size);
  parallel_for(s.rows, grain, [=, &table, &sums](std::int64_t begin, std::int64_t end) {
    T* dw_piece = normed ? sums.start(begin) : nullptr;
    for (std::int64_t i = begin; i < end; ++i) {
      const T* from = dout + i * row_size;
      T* to = dqkv + i * row_size;
      const T* cosines = table.cosines(positions[i]);
      const T* sines = table.sines(positions[i]);
      for (std::int64_t h = 0; h < turned; ++h, from += d, to += d) {
        rotate_back(to, from, cosines, sines, half);
        if (!normed) continue;
        const T* x = qkv + i * row_size + h * d;
        const T* w = h < queries ? q_weight : k_weight;
        T* dw = h < queries ? dw_piece : dw_piece + d;
        const T reciprocal = rstd[i * turned + h];
        T product = 0;
#pragma omp simd reduction(+ : product)
        for (std::int64_t j = 0; j < d; ++j) {
          const T t = to[j] * x[j];
          product += t * w[j];
          dw[j] += t * reciprocal;
        }
        const T pull = reciprocal * reciprocal * reciprocal * (product / static_cast<T>(d));
#pragma omp simd
        for (std::int64_t j = 0; j < d; ++j) to[j] = reciprocal * w[j] * to[j] - pull * x[j];
      }
      copy_elements(to, from, values);
    }
  });
  if (normed) {
    sums.add_to(dq_weight, d);
    sums.add_to(dk_weight, d, d);
  }
}

void check_shape(const char* op, const QkvShape& s, ConstView q_weight, ConstView k_weight) {
  if (s.head_dim < 2 || s.head_dim % 2 != 0) fail(op, "head_dim, which must be even", s.head_dim, 2);
  if (q_weight && !k_weight) fail_null(op, "k_weight");
  if (k_weight && !q_weight) fail_null(op, "q_weight");
}

template <typename T>
const std::int32_t* prepare(const char* op, RopeTable<T>& table, ConstView positions, const QkvShape& s) {
  const auto* p = input<std::int32_t>(op, "positions", positions, s.rows);
  check_indices(op, "a position", p, s.rows, 0, std::int64_t{1} << 31);
  std::int32_t last = 0;
  for (std::int64_t i = 0; i < s.rows; ++i) last = p[i] > last ? p[i] : last;
  table.prepare(last + std::int64_t{1}, s.head_dim, s.rope_theta, s.rope_scaling);
  return p;
}

FATHOM_INLINE RopeTable<float>& pick(RopeTable<float>& f32, RopeTable<double>&, float) { return f32; }
FATHOM_INLINE RopeTable<double>& pick(RopeTable<float>&, RopeTable<double>& f64, double) { return f64; }

}  // namespace

void CpuBackend::rope_forward(View out, View rstd, ConstView qkv, ConstView positions, ConstView q_weight,
                              ConstView k_weight, const QkvShape& s) {
  const char* op = "rope_forward";
  check_shape(op, s, q_weight, k_weight);
  const std::int64_t n = s.rows * s.row_size();
  for_compute_type(op, out.dtype, [&](auto zero) {
    using T = decltype(zero);
    RopeTable<T>& table = pick(rope_f32_, rope_f64_, zero);
    const std::int32_t* p = prepare(op, table, positions, s);
    T* r = q_weight ? output<T>(op, "rstd", rstd, s.rows * (s.heads + s.kv_heads)) : nullptr;
    forward<T>(output<T>(op, "out", out, n), r, input<T>(op, "qkv", qkv, n), p,
               optional_input<T>(op, "q_weight", q_weight, s.head_dim),
               optional_input<T>(op, "k_weight", k_weight, s.head_dim), s, table);
  });
}

void CpuBackend::rope_backward(View dqkv, View dq_weight_accumulate, View dk_weight_accumulate,
                               ConstView dout, ConstView qkv, ConstView rstd, ConstView positions,
                               ConstView q_weight, ConstView k_weight, const QkvShape& s) {
  const char* op = "rope_backward";
  check_shape(op, s, q_weight, k_weight);
  const std::int64_t n = s.rows * s.row_size();
  for_compute_type(op, dqkv.dtype, [&](auto zero) {
    using T = decltype(zero);
    RopeTable<T>& table = pick(rope_f32_, rope_f64_, zero);
    const std::int32_t* p = prepare(op, table, positions, s);
    T* dx = output<T>(op, "dqkv", dqkv, n);
    const T* dy = input<T>(op, "dout", dout, n);
    if (!q_weight) {
      backward<T>(dx, nullptr, nullptr, dy, nullptr, nullptr, p, nullptr, nullptr, s, table);
      return;
    }
    backward<T>(dx, output<T>(op, "dq_weight", dq_weight_accumulate, s.head_dim),
                output<T>(op, "dk_weight", dk_weight_accumulate, s.head_dim), dy, input<T>(op, "qkv", qkv, n),
                input<T>(op, "rstd", rstd, s.rows * (s.heads + s.kv_heads)), p,
                input<T>(op, "q_weight", q_weight, s.head_dim),
                input<T>(op, "k_weight", k_weight, s.head_dim), s, table);
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
