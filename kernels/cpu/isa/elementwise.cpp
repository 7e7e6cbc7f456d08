// fill, cast, add, scale, and sums over all elements.
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/partials.h"
#include "kernels/cpu/isa/vector_math.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

struct Bf16 {
  std::uint16_t bits;
};

FATHOM_INLINE float load(float x) { return x; }
FATHOM_INLINE double load(double x) { return x; }
FATHOM_INLINE float load(Bf16 x) { return float_of(static_cast<std::uint32_t>(x.bits) << 16); }

FATHOM_INLINE void store(float& to, double x) { to = static_cast<float>(x); }
FATHOM_INLINE void store(float& to, float x) { to = x; }
FATHOM_INLINE void store(double& to, double x) { to = x; }
/// To the nearest, of two as near the even one; a NaN stays a NaN.
FATHOM_INLINE void store(Bf16& to, float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = (bits + 0x7fffU + (bits >> 16 & 1U)) >> 16;
  to.bits = static_cast<std::uint16_t>(x == x ? rounded : (bits >> 16 | 0x40U));
}
/// Through float, first rounded to odd so that the second rounding sees which side of a tie x was on.
FATHOM_INLINE void store(Bf16& to, double x) {
  const auto near = static_cast<float>(x);
  std::uint32_t bits = bits_of(near);
  const double back = near;
  const bool infinite = (bits & 0x7fffffffU) == 0x7f800000U;
  if (x == x && back != x && !infinite) {
    const bool too_large = (back < 0 ? -back : back) > (x < 0 ? -x : x);
    bits = (too_large ? bits - 1 : bits) | 1U;
  }
  store(to, float_of(bits));
}

template <typename To, typename From>
void cast_elements(View out, ConstView in) {
  auto* to = static_cast<To*>(out.data);
  const auto* from = static_cast<const From*>(in.data);
  parallel_for(out.size, kGrain, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) store(to[i], load(from[i]));
  });
}

template <typename To>
void cast_to(View out, ConstView in) {
  switch (in.dtype) {
    case DType::F32:
      return cast_elements<To, float>(out, in);
    case DType::F64:
      return cast_elements<To, double>(out, in);
    case DType::BF16:
      return cast_elements<To, Bf16>(out, in);
    default:
      fail_dtype("cast", in.dtype);
  }
}

template <typename T>
void fill_elements(View out, T value) {
  auto* to = static_cast<T*>(out.data);
  parallel_for(out.size, kGrain, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) to[i] = value;
  });
}

template <typename T>
void add_elements(T* out, const T* a, const T* b, std::int64_t n) {
  parallel_for(n, kGrain, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
    for (std::int64_t i = begin; i < end; ++i) out[i] = a[i] + b[i];
  });
}

template <typename T>
double sum_piece(const T* in, std::int64_t begin, std::int64_t end) {
  double s = 0;
#pragma omp simd reduction(+ : s)
  for (std::int64_t i = begin; i < end; ++i) s += static_cast<double>(in[i]);
  return s;
}

template <typename T>
double squares_piece(const T* in, std::int64_t begin, std::int64_t end) {
  double s = 0;
#pragma omp simd reduction(+ : s)
  for (std::int64_t i = begin; i < end; ++i) s += static_cast<double>(in[i]) * static_cast<double>(in[i]);
  return s;
}

/// The sum over pieces of fixed size, added in order.
template <typename T, double (*piece)(const T*, std::int64_t, std::int64_t)>
double sum_pieces(const T* in, std::int64_t n) {
  const std::int64_t pieces = (n + kGrain - 1) / kGrain;
  const Scratch<double> scratch(pieces);
  double* sums = scratch.data();
  parallel_for(n, kGrain,
               [=](std::int64_t begin, std::int64_t end) { sums[begin / kGrain] = piece(in, begin, end); });
  double total = 0;
  for (std::int64_t p = 0; p < pieces; ++p) total += sums[p];
  return total;
}

template <typename T, typename Bits>
Bits count_piece(const T* in, std::int64_t begin, std::int64_t end, Bits exponent) {
  Bits count = 0;
#pragma omp simd reduction(+ : count)
  for (std::int64_t i = begin; i < end; ++i) {
    count += static_cast<Bits>((bits_of(in[i]) & exponent) == exponent);
  }
  return count;
}

template <typename T, typename Bits>
std::int64_t count_pieces(const T* in, std::int64_t n, Bits exponent) {
  const std::int64_t pieces = (n + kGrain - 1) / kGrain;
  const Scratch<std::int64_t> scratch(pieces);
  std::int64_t* counts = scratch.data();
  parallel_for(n, kGrain, [=](std::int64_t begin, std::int64_t end) {
    counts[begin / kGrain] = static_cast<std::int64_t>(count_piece(in, begin, end, exponent));
  });
  std::int64_t total = 0;
  for (std::int64_t p = 0; p < pieces; ++p) total += counts[p];
  return total;
}

}  // namespace

void CpuBackend::fill(View out, double value) {
  if (out.data == nullptr && out.size > 0) fail_null("fill", "out");
  switch (out.dtype) {
    case DType::F32:
      return fill_elements(out, static_cast<float>(value));
    case DType::F64:
      return fill_elements(out, value);
    case DType::BF16: {
      Bf16 rounded{};
      store(rounded, value);
      return fill_elements(out, rounded.bits);
    }
    case DType::I32:
      return fill_elements(out, static_cast<std::int32_t>(value));
    case DType::I64:
      return fill_elements(out, static_cast<std::int64_t>(value));
    case DType::U8:
      return fill_elements(out, static_cast<std::uint8_t>(value));
  }
}

void CpuBackend::cast(View out, ConstView in) {
  check_size("cast", "in", in.size, out.size);
  if (out.data == nullptr && out.size > 0) fail_null("cast", "out");
  if (in.data == nullptr && in.size > 0) fail_null("cast", "in");
  switch (out.dtype) {
    case DType::F32:
      return cast_to<float>(out, in);
    case DType::F64:
      return cast_to<double>(out, in);
    case DType::BF16:
      return cast_to<Bf16>(out, in);
    default:
      fail_dtype("cast", out.dtype);
  }
}

void CpuBackend::add(View out, ConstView a, ConstView b) {
  for_compute_type("add", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    add_elements(output<T>("add", "out", out, out.size), input<T>("add", "a", a, out.size),
                 input<T>("add", "b", b, out.size), out.size);
  });
}

void CpuBackend::accumulate(View out, ConstView in) {
  for_compute_type("accumulate", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>("accumulate", "out", out, out.size);
    add_elements(to, to, input<T>("accumulate", "in", in, out.size), out.size);
  });
}

void CpuBackend::scale(View out, double factor) {
  for_compute_type("scale", out.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>("scale", "out", out, out.size);
    const T f = static_cast<T>(factor);
    parallel_for(out.size, kGrain, [=](std::int64_t begin, std::int64_t end) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) to[i] *= f;
    });
  });
}

void CpuBackend::sum(View out, ConstView in) {
  for_compute_type("sum", in.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>("sum", "out", out, 1);
    *to = static_cast<T>(sum_pieces<T, sum_piece<T>>(input<T>("sum", "in", in, in.size), in.size));
  });
}

void CpuBackend::sum_squares(View out, ConstView in) {
  for_compute_type("sum_squares", in.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = output<T>("sum_squares", "out", out, 1);
    *to =
        static_cast<T>(sum_pieces<T, squares_piece<T>>(input<T>("sum_squares", "in", in, in.size), in.size));
  });
}

std::int64_t CpuBackend::count_nonfinite(ConstView in) {
  const char* op = "count_nonfinite";
  if (in.dtype == DType::F32) return count_pieces(input<float>(op, "in", in, in.size), in.size, 0x7f800000U);
  if (in.dtype == DType::F64) {
    return count_pieces(input<double>(op, "in", in, in.size), in.size, std::uint64_t{0x7ff0000000000000});
  }
  fail_dtype(op, in.dtype);
}

}  // namespace fathom::cpu::FATHOM_ISA
