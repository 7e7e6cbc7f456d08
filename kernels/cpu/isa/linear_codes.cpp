// y = x W^T of codes with codes: sums of products in 32 bits of integer, which are exact, and then the
// scales. AVX-512 multiplies bytes by VNNI where the processor has it (unsigned by signed ones: 128 is added
// to x's, and 128 times W's sum taken away again), else pairs of 16 bits, as AVX2 does.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernels/code_operands.h"
#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/parallel.h"
#include "kernels/cpu/isa/simd.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

/// The operands of one product.
struct Rows {
  const std::uint8_t* codes;  // one a byte
  const float* scales;        // one a row
  std::int64_t row_bytes;
};
struct Matrix {
  const std::uint8_t* codes;
  const float* scales;
  PackedFormat format;

  const std::uint8_t* row(std::int64_t o) const { return codes + o * format.row_bytes(); }
  const float* row_scales(std::int64_t o) const { return scales + o * format.groups(); }
};

/// Any group, and processors without vectors of products: one sum at a time.
template <typename T>
void plain_rows(T* y, const Rows& x, const Matrix& w, std::int64_t begin, std::int64_t end,
                const LinearShape& s) {
  constexpr std::int64_t kAtOnce = 1024;
  const PackedFormat& f = w.format;
  std::int8_t split[kAtOnce];
  for (std::int64_t o = begin; o < end; ++o) {
    const auto* packed = reinterpret_cast<const std::int8_t*>(w.row(o));
    const float* scales = w.row_scales(o);
    for (std::int64_t r = 0; r < s.rows; ++r) {
      const auto* from = reinterpret_cast<const std::int8_t*>(x.codes + r * x.row_bytes);
      T sum = 0;
      std::int32_t dot = 0;
      for (std::int64_t c = 0; c < f.columns;) {
        const std::int64_t first = c, last = first + kAtOnce < f.columns ? first + kAtOnce : f.columns;
        const std::int8_t* codes = packed + first;
        if (f.bits == 4) {
          for (std::int64_t i = 0; i < (last - first + 1) / 2; ++i) {
            const std::int8_t two = packed[first / 2 + i];
            split[2 * i] = static_cast<std::int8_t>(static_cast<std::int8_t>(two << 4) >> 4);
            split[2 * i + 1] = static_cast<std::int8_t>(two >> 4);
          }
          codes = split;
        }
        while (c < last) {
          const std::int64_t group_end = (c / f.group + 1) * f.group;
          const std::int64_t here = group_end < last ? group_end : last;
          std::int32_t part = 0;
#pragma omp simd reduction(+ : part)
          for (std::int64_t i = c; i < here; ++i) part += std::int32_t{from[i]} * codes[i - first];
          dot += part;
          c = here;
          if (c != group_end) continue;
          sum += static_cast<T>(dot) * static_cast<T>(scales[(c - 1) / f.group]);
          dot = 0;
        }
      }
      y[r * s.out + o] = sum * static_cast<T>(x.scales[r]);
    }
  }
}

#if defined(__AVX2__)

using Ints = Vec<std::int32_t>;
constexpr int kRowsAtOnce = kVectorBytes == 64 ? 4 : 2, kOutsAtOnce = kVectorBytes == 64 ? 4 : 2;

#if defined(__AVX512F__)
using Bytes = __m512i;
[[gnu::always_inline]] inline Bytes load_bytes(const std::uint8_t* p) { return _mm512_loadu_si512(p); }
[[gnu::always_inline]] inline Bytes load_nibbles(const std::uint8_t* p) {
  const Bytes two = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const Bytes apart = _mm512_and_si512(_mm512_or_si512(two, _mm512_slli_epi16(two, 4)), _mm512_set1_epi8(15));
  const Bytes eight = _mm512_set1_epi8(8);
  return _mm512_sub_epi8(_mm512_xor_si512(apart, eight), eight);
}
[[gnu::always_inline]] inline Bytes lower(Bytes b) { return _mm512_cvtepi8_epi16(_mm512_castsi512_si256(b)); }
[[gnu::always_inline]] inline Bytes upper(Bytes b) {
  return _mm512_cvtepi8_epi16(_mm512_extracti64x4_epi64(b, 1));
}
[[gnu::always_inline]] inline Ints pairs(Bytes a, Bytes b) {
  return reinterpret_cast<Ints>(_mm512_madd_epi16(a, b));
}
#else
using Bytes = __m256i;
[[gnu::always_inline]] inline Bytes load_bytes(const std::uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
[[gnu::always_inline]] inline Bytes load_nibbles(const std::uint8_t* p) {
  const Bytes two = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const Bytes apart = _mm256_and_si256(_mm256_or_si256(two, _mm256_slli_epi16(two, 4)), _mm256_set1_epi8(15));
  const Bytes eight = _mm256_set1_epi8(8);
  return _mm256_sub_epi8(_mm256_xor_si256(apart, eight), eight);
}
[[gnu::always_inline]] inline Bytes lower(Bytes b) { return _mm256_cvtepi8_epi16(_mm256_castsi256_si128(b)); }
[[gnu::always_inline]] inline Bytes upper(Bytes b) {
  return _mm256_cvtepi8_epi16(_mm256_extracti128_si256(b, 1));
}
[[gnu::always_inline]] inline Ints pairs(Bytes a, Bytes b) {
  return reinterpret_cast<Ints>(_mm256_madd_epi16(a, b));
}
#endif

template <int bits>
[[gnu::always_inline]] inline Bytes load_codes(const std::uint8_t* row, std::int64_t k) {
  return bits == 4 ? load_nibbles(row + k / 2) : load_bytes(row + k);
}

/// Where the operands of a tile of y lie.
template <int rows, int outs>
struct Tile {
  const std::uint8_t* x[rows];
  const std::uint8_t* w[outs];
  const float* scales[outs];
};

/// What a group's sums add to those with scales.
template <int rows, int outs>
[[gnu::always_inline]] inline void add_scaled(Vec<float> (&sums)[rows][outs], const Ints (&sum)[rows][outs],
                                              const Tile<rows, outs>& t, std::int64_t group) {
#pragma GCC unroll 4
  for (int o = 0; o < outs; ++o) {
    const Vec<float> scale = broadcast<float>(t.scales[o][group]);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) sums[r][o] += __builtin_convertvector(sum[r][o], Vec<float>) * scale;
  }
}

/// Sums over the columns [begin, end), whole vectors; and over all groups, with their scales.
template <int bits, int rows, int outs>
struct ByPairs {
  static void add(Ints (&sum)[rows][outs], const Tile<rows, outs>& t, std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; k += kVectorBytes) {
      Bytes low[outs], high[outs];
#pragma GCC unroll 4
      for (int o = 0; o < outs; ++o) {
        const Bytes codes = load_codes<bits>(t.w[o], k);
        low[o] = lower(codes), high[o] = upper(codes);
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Bytes codes = load_bytes(t.x[r] + k), l = lower(codes), h = upper(codes);
#pragma GCC unroll 4
        for (int o = 0; o < outs; ++o) sum[r][o] += pairs(l, low[o]) + pairs(h, high[o]);
      }
    }
  }
  static void add_groups(Vec<float> (&sums)[rows][outs], const Tile<rows, outs>& t, const PackedFormat& f) {
    for (std::int64_t g = 0; g < f.groups(); ++g) {
      Ints sum[rows][outs] = {};
      add(sum, t, g * f.group, (g + 1) * f.group);
      add_scaled<rows, outs>(sums, sum, t, g);
    }
  }
};

#if defined(__AVX512F__)
template <int bits, int rows, int outs>
struct ByBytes {
  [[gnu::target("avx512vnni")]] static void add(Ints (&sum)[rows][outs], const Tile<rows, outs>& t,
                                                std::int64_t begin, std::int64_t end) {
    const Bytes offset = _mm512_set1_epi8(static_cast<char>(0x80));
    Bytes dot[rows][outs], extra[outs];
#pragma GCC unroll 4
    for (int o = 0; o < outs; ++o) {
      extra[o] = _mm512_setzero_si512();
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) dot[r][o] = _mm512_setzero_si512();
    }
    for (std::int64_t k = begin; k < end; k += kVectorBytes) {
      Bytes codes[outs];
#pragma GCC unroll 4
      for (int o = 0; o < outs; ++o) {
        codes[o] = load_codes<bits>(t.w[o], k);
        extra[o] = _mm512_dpbusd_epi32(extra[o], offset, codes[o]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const Bytes from = _mm512_xor_si512(load_bytes(t.x[r] + k), offset);
#pragma GCC unroll 4
        for (int o = 0; o < outs; ++o) dot[r][o] = _mm512_dpbusd_epi32(dot[r][o], from, codes[o]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
      for (int o = 0; o < outs; ++o)
        sum[r][o] = reinterpret_cast<Ints>(_mm512_sub_epi32(dot[r][o], extra[o]));
    }
  }
  [[gnu::target("avx512vnni")]] static void add_groups(Vec<float> (&sums)[rows][outs],
                                                       const Tile<rows, outs>& t, const PackedFormat& f) {
    for (std::int64_t g = 0; g < f.groups(); ++g) {
      Ints sum[rows][outs];
      add(sum, t, g * f.group, (g + 1) * f.group);
      add_scaled<rows, outs>(sums, sum, t, g);
    }
  }
};
#endif

[[gnu::always_inline]] inline std::int32_t sum_of_ints(Ints v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(v));
#else
  const auto all = reinterpret_cast<__m256i>(v);
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
#endif
}

/// A tile of y: rows from x.codes and W's rows from `out` on.
template <typename T, typename Dots, int rows, int outs>
void tile_of(T* y, const Rows& x, const Matrix& w, std::int64_t out, const LinearShape& s) {
  Tile<rows, outs> t;
  for (int r = 0; r < rows; ++r) t.x[r] = x.codes + r * x.row_bytes;
  for (int o = 0; o < outs; ++o) t.w[o] = w.row(out + o), t.scales[o] = w.row_scales(out + o);
  if (w.format.groups() == 1) {
    Ints sum[rows][outs] = {};
    Dots::add(sum, t, 0, x.row_bytes);
    for (int r = 0; r < rows; ++r) {
      for (int o = 0; o < outs; ++o) {
        y[r * s.out + out + o] = static_cast<T>(sum_of_ints(sum[r][o])) * static_cast<T>(*t.scales[o]) *
                                 static_cast<T>(x.scales[r]);
      }
    }
    return;
  }
  Vec<float> sums[rows][outs] = {};
  Dots::add_groups(sums, t, w.format);
  for (int r = 0; r < rows; ++r) {
    for (int o = 0; o < outs; ++o) {
      y[r * s.out + out + o] = static_cast<T>(sum_of_lanes<float>(sums[r][o])) * static_cast<T>(x.scales[r]);
    }
  }
}

bool has_vnni() {
#if defined(__AVX512F__)
  static const bool has = __builtin_cpu_supports("avx512vnni") != 0;
  return has;
#else
  return false;
#endif
}

/// `outs` columns of y for all rows: W's rows stay in the first-level cache meanwhile.
template <typename T, int bits, int rows, int outs>
void columns_of(T* y, const Rows& x, const Matrix& w, std::int64_t out, const LinearShape& s, bool vnni) {
  std::int64_t r = 0;
  for (; r + rows <= s.rows; r += rows) {
    const Rows from{x.codes + r * x.row_bytes, x.scales + r, x.row_bytes};
#if defined(__AVX512F__)
    if (vnni) {
      tile_of<T, ByBytes<bits, rows, outs>, rows, outs>(y + r * s.out, from, w, out, s);
      continue;
    }
#endif
    tile_of<T, ByPairs<bits, rows, outs>, rows, outs>(y + r * s.out, from, w, out, s);
  }
  if constexpr (rows > 1) {
    if (r == s.rows) return;
    LinearShape left = s;
    left.rows = s.rows - r;
    columns_of<T, bits, rows - 1, outs>(y + r * s.out, {x.codes + r * x.row_bytes, x.scales + r, x.row_bytes},
                                        w, out, left, vnni);
  }
}

template <typename T, int bits>
void rows_of(T* y, const Rows& x, const Matrix& w, std::int64_t begin, std::int64_t end,
             const LinearShape& s) {
  const bool vnni = has_vnni();
  std::int64_t o = begin;
  for (; o + kOutsAtOnce <= end; o += kOutsAtOnce)
    columns_of<T, bits, kRowsAtOnce, kOutsAtOnce>(y, x, w, o, s, vnni);
  for (; o < end; ++o) columns_of<T, bits, kRowsAtOnce, 1>(y, x, w, o, s, vnni);
}

#endif

template <typename T>
void product_of(T* y, const Rows& x, const Matrix& w, std::int64_t begin, std::int64_t end,
                const LinearShape& s) {
#if defined(__AVX2__)
  if (w.format.groups() == 1 || w.format.group % kVectorBytes == 0) {
    if (w.format.bits == 4) return rows_of<T, 4>(y, x, w, begin, end, s);
    return rows_of<T, 8>(y, x, w, begin, end, s);
  }
#endif
  plain_rows<T>(y, x, w, begin, end, s);
}

}  // namespace

void CpuBackend::linear_codes_forward(View y, const PackedView& x, const PackedView& w,
                                      const LinearShape& s) {
  const char* op = "linear_codes_forward";
  const PackedFormat& f = w.format;
  check_codes_product(op, x.format, f, s);
  const std::int64_t row_bytes = x.format.row_bytes();
  const auto* rows = input<std::uint8_t>(op, "x", x.codes, s.batch * s.rows * row_bytes);
  const auto* row_scales = input<float>(op, "scales of x", x.scales, s.batch * s.rows);
  const auto* codes = input<std::uint8_t>(op, "codes", w.codes, s.batch * s.out * f.row_bytes());
  const auto* scales = input<float>(op, "scales", w.scales, s.batch * s.out * f.groups());
  for_compute_type(op, y.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = output<T>(op, "y", y, s.batch * s.rows * s.out);
    if (s.rows * s.out == 0) return;
    for (std::int64_t e = 0; e < s.batch; ++e) {
      const Rows from{rows + e * s.rows * row_bytes, row_scales + e * s.rows, row_bytes};
      const Matrix matrix{codes + e * s.out * f.row_bytes(), scales + e * s.out * f.groups(), f};
      T* to = out + e * s.rows * s.out;
      // Whole tiles; a piece is worth a thread from some 256 Ki multiply-adds.
      const std::int64_t grain = (262144 / (s.in * s.rows) + 4) / 4 * 4;
      parallel_for(s.out, grain, [&](std::int64_t begin, std::int64_t end) {
        product_of<T>(to, from, matrix, begin, end, s);
      });
      flop_log.gemm(s.rows, s.out, s.in);
    }
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
