// Rows as codes of few bits. The largest magnitude is that of the floats' bits without their signs, in which
// what is not finite comes last.
#include "kernels/code_operands.h"
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/parallel.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

constexpr float kLargest = __FLT_MAX__;
constexpr std::int32_t kInfinity = 0x7f800000;

template <typename T>
std::int32_t largest_bits(const T* x, std::int64_t n) {
  std::int32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (std::int64_t i = 0; i < n; ++i) {
    const auto v = static_cast<float>(x[i]);
    std::int32_t bits;
    __builtin_memcpy(&bits, &v, sizeof(bits));
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

/// Returns the scale.
template <typename T>
float quantize_row(std::int8_t* __restrict codes, const T* __restrict x, const RowQuantization& s) {
  const float least = -static_cast<float>(1 << (s.bits - 1)), most = -least - 1;
  const std::int32_t bits = largest_bits(x, s.columns);
  const std::int64_t padded = s.format().row_bytes();
  if (bits >= kInfinity) {
    __builtin_memset(codes, 0, static_cast<std::size_t>(padded));
    return __builtin_nanf("");
  }
  float largest;
  __builtin_memcpy(&largest, &bits, sizeof(largest));
  float scale = largest * (s.clip / most);
  scale = scale < kLargest / -least ? scale : kLargest / -least;
  if (!(scale > 0)) scale = 1;
#pragma omp simd
  for (std::int64_t i = 0; i < s.columns; ++i) {
    // Sums with 1.5 * 2^23 have no fraction in fp32.
    constexpr float kNoFraction = 0x1.8p23F;
    float code = static_cast<float>(x[i]) / scale;
    code = code < least ? least : code;
    code = code > most ? most : code;
    codes[i] = static_cast<std::int8_t>(static_cast<std::int32_t>(code + kNoFraction - kNoFraction));
  }
  for (std::int64_t i = s.columns; i < padded; ++i) codes[i] = 0;
  return scale;
}

}  // namespace

void CpuBackend::quantize_rows(View codes, View scales, ConstView x, const RowQuantization& s) {
  const char* op = "quantize_rows";
  check_row_quantization(op, s);
  const std::int64_t row_bytes = s.format().row_bytes();
  auto* to = reinterpret_cast<std::int8_t*>(output<std::uint8_t>(op, "codes", codes, s.rows * row_bytes));
  auto* to_scales = output<float>(op, "scales", scales, s.rows);
  for_compute_type(op, x.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* in = input<T>(op, "x", x, s.x_size());
    parallel_for(s.rows, 16384 / s.columns + 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t r = begin; r < end; ++r)
        to_scales[r] = quantize_row<T>(to + r * row_bytes, in + r * s.x_row(), s);
    });
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
