// y = x W^T with W of few bits. Few rows: codes become numbers in registers, so that what a product reads is
// the codes, once for all rows. Many rows, and the invariant mode: a tile of W becomes numbers in memory, and
// the product is linear_forward's.
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels/cpu/isa/cpu_backend.h"
#include "kernels/cpu/isa/parallel.h"
#include "kernels/cpu/isa/simd.h"
#include "kernels/cpu/isa/tile_memory.h"
#include "kernels/cpu/isa/views.h"

namespace fathom::cpu::FATHOM_ISA {

namespace {

/// Of a tile of W in memory: enough columns for the library, and the whole of most matrices.
constexpr std::int64_t kTileBytes = 16 << 20;
/// Up to so many rows, codes become numbers in registers; and rows and columns of y whose sums are held
/// there.
#if defined(__AVX512F__)
constexpr std::int64_t kFewRows = 24;
constexpr int kRowsAtOnce = 4, kOutsAtOnce = 4, kOutsOfOneRow = 8;
#else
constexpr std::int64_t kFewRows = 16;
constexpr int kRowsAtOnce = 4, kOutsAtOnce = 2, kOutsOfOneRow = 4;
#endif

using Words [[gnu::vector_size(kVectorBytes)]] = std::int32_t;
template <int bits>
constexpr int kCodes = 32 / bits;  // of a word
/// Columns whose codes are one vector: lane l of it has columns l * kCodes, ...
template <int bits>
constexpr int kRun = kCodes<bits>* kLanes<float>;

/// How scales lie over a run of columns.
enum class Scales : std::uint8_t {
  OneARun,  // a group is whole runs, or the whole row
  ByLane,   // a run is whole groups, and a group whole words
  Other,
};

/// The matrix of one product.
struct Matrix {
  const std::uint8_t* codes;
  const float* scales;
  PackedFormat format;

  const std::uint8_t* row(std::int64_t o) const { return codes + o * format.row_bytes(); }
  const float* row_scales(std::int64_t o) const { return scales + o * format.groups(); }
};

template <int bits>
Scales scales_of(const PackedFormat& f) {
  if (f.group == f.columns || f.group % kRun<bits> == 0) return Scales::OneARun;
  return f.group % kCodes<bits> == 0 && kRun<bits> % f.group == 0 ? Scales::ByLane : Scales::Other;
}

/// What makes weights of a run's codes: the scale on every lane; with AVX-512 and 4 bits all sixteen weights
/// that there can be.
template <int bits>
[[gnu::always_inline]] inline Vec<float> weights_of(float scale) {
#if defined(__AVX512F__)
  if constexpr (bits == 4) {
    return Vec<float>{0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1} * broadcast<float>(scale);
  }
#endif
  return broadcast<float>(scale);
}

/// The same of a run with several groups; `group_of` is that of each lane, from the run's first on.
[[gnu::always_inline]] inline Vec<float> lane_scales(const float* scales, const std::int32_t* group_of,
                                                     std::int64_t left) {
  float lanes[kLanes<float>];
#pragma GCC unroll 16
  for (int l = 0; l < kLanes<float>; ++l) lanes[l] = scales[group_of[l] < left ? group_of[l] : left - 1];
  return load<float>(lanes);
}

/// The weights of code n of each word.
template <int bits, Scales kind>
[[gnu::always_inline]] inline Vec<float> weights(Words words, int n, Vec<float> made_by) {
#if defined(__AVX512F__)
  if constexpr (bits == 4 && kind == Scales::OneARun) {
    // The lower four bits of a lane choose.
    return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(words >> (n * bits)), made_by);
  }
#endif
  return __builtin_convertvector(words << (32 - bits * (n + 1)) >> (32 - bits), Vec<float>) * made_by;
}

/// Rows of x as the codes of a run come: first those of code 0 of each word, then those of code 1, ...
template <int bits>
void stage(float* staged, std::int64_t ld, const float* x, const LinearShape& s) {
  for (std::int64_t r = 0; r < s.rows; ++r, x += s.x_row(), staged += ld) {
    for (std::int64_t k = 0; k < ld; k += kRun<bits>) {
      for (int n = 0; n < kCodes<bits>; ++n) {
        for (int l = 0; l < kLanes<float>; ++l) {
          const std::int64_t column = k + l * kCodes<bits> + n;
          staged[k + n * kLanes<float> + l] = column < s.in ? x[column] : 0.0F;
        }
      }
    }
  }
}

/// Staged rows: `ld` columns each, whole runs.
struct Staged {
  const float* data;
  std::int64_t ld;
};

/// y [rows, outs] of `rows` staged rows and the rows of W from `out` on. What a row's sums are does not
/// depend on how many rows there are.
template <int bits, Scales kind, int rows, int outs>
void dot_products(float* y, std::int64_t ld_y, Staged x, const Matrix& w, std::int64_t out,
                  const std::int32_t* group_of) {
  constexpr int W = kLanes<float>, run = kRun<bits>;
  const PackedFormat& f = w.format;
  const std::int64_t span = kind == Scales::ByLane || f.groups() > 1 ? f.group : x.ld;
  const std::uint8_t* codes[outs];
  const float* scales[outs];
  for (int o = 0; o < outs; ++o) codes[o] = w.row(out + o), scales[o] = w.row_scales(out + o);
  const std::int64_t ahead = outs * f.row_bytes();
  Vec<float> sum[rows][outs] = {};
  const auto add_run = [&](std::int64_t k, const Vec<float>(&made_by)[outs]) __attribute__((always_inline)) {
    Words words[outs];
#pragma GCC unroll 8
    for (int o = 0; o < outs; ++o) {
      const std::uint8_t* from = codes[o] + k / run * kVectorBytes;
      __builtin_memcpy(&words[o], from, sizeof(Words));
      __builtin_prefetch(from + ahead);  // rows are too short for the processor to foresee the next ones
    }
#pragma GCC unroll 8
    for (int n = 0; n < kCodes<bits>; ++n) {
      Vec<float> xs[rows];
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) xs[r] = load<float>(x.data + r * x.ld + k + n * W);
#pragma GCC unroll 8
      for (int o = 0; o < outs; ++o) {
        const Vec<float> column = weights<bits, kind>(words[o], n, made_by[o]);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) sum[r][o] += column * xs[r];
      }
    }
  };
  Vec<float> made_by[outs];
  if constexpr (kind == Scales::OneARun) {
    for (std::int64_t k = 0, g = 0; k < x.ld; ++g) {
#pragma GCC unroll 8
      for (int o = 0; o < outs; ++o) made_by[o] = weights_of<bits>(scales[o][g]);
      for (const std::int64_t end = k + span; k < end; k += run) add_run(k, made_by);
    }
  } else {
    for (std::int64_t k = 0; k < x.ld; k += run) {
      const std::int64_t first = k / span, left = f.groups() - first;
      for (int o = 0; o < outs; ++o) made_by[o] = lane_scales(scales[o] + first, group_of, left);
      add_run(k, made_by);
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int o = 0; o < outs; ++o) y[r * ld_y + o] = sum_of_lanes<float>(sum[r][o]);
  }
}

/// `outs` columns of y for all rows, at most `rows` at a time: then the codes lie in the first-level cache.
template <int bits, Scales kind, int rows, int outs>
void few_rows_of(float* y, Staged x, const Matrix& w, std::int64_t out, const LinearShape& s,
                 const std::int32_t* group_of) {
  std::int64_t r = 0;
  for (; r + rows <= s.rows; r += rows) {
    dot_products<bits, kind, rows, outs>(y + r * s.out + out, s.out, {x.data + r * x.ld, x.ld}, w, out,
                                         group_of);
  }
  if constexpr (rows > 1) {
    if (r == s.rows) return;
    LinearShape left = s;
    left.rows = s.rows - r;
    few_rows_of<bits, kind, rows - 1, outs>(y + r * s.out, {x.data + r * x.ld, x.ld}, w, out, left, group_of);
  }
}

template <int bits, Scales kind>
void few_rows(float* y, const float* x, const Matrix& w, const LinearShape& s) {
  const std::int64_t ld = (s.in + kRun<bits> - 1) / kRun<bits> * kRun<bits>;
  const TileMemory memory(s.rows * ld * static_cast<std::int64_t>(sizeof(float)));
  auto* const staged = static_cast<float*>(memory.data());
  stage<bits>(staged, ld, x, s);
  std::int32_t group_of[kLanes<float>];
  for (int l = 0; l < kLanes<float>; ++l)
    group_of[l] = static_cast<std::int32_t>(l * kCodes<bits> / w.format.group);
  const std::int64_t outs = s.rows == 1 ? kOutsOfOneRow : kOutsAtOnce;
  // A piece is worth a thread from some 64 Ki multiply-adds.
  const std::int64_t grain = (65536 / (s.in * s.rows) + outs) / outs * outs;
  parallel_for(s.out, grain, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t o = begin;
    for (; o + outs <= end; o += outs) {
      if (s.rows == 1) {
        few_rows_of<bits, kind, 1, kOutsOfOneRow>(y, {staged, ld}, w, o, s, group_of);
      } else {
        few_rows_of<bits, kind, kRowsAtOnce, kOutsAtOnce>(y, {staged, ld}, w, o, s, group_of);
      }
    }
    for (; o < end; ++o) few_rows_of<bits, kind, kRowsAtOnce, 1>(y, {staged, ld}, w, o, s, group_of);
  });
}

/// Whether it is done: scales may lie otherwise than it reads them.
template <int bits>
bool try_few_rows(float* y, const float* x, const Matrix& w, const LinearShape& s) {
  const Scales kind = scales_of<bits>(w.format);
  if (kind == Scales::OneARun) few_rows<bits, Scales::OneARun>(y, x, w, s);
  if (kind == Scales::ByLane) few_rows<bits, Scales::ByLane>(y, x, w, s);
  return kind != Scales::Other;
}

/// Codes of 4 bits, one a byte.
void split_bytes(std::int8_t* __restrict codes, const std::int8_t* __restrict packed, std::int64_t bytes) {
  for (std::int64_t i = 0; i < bytes; ++i) {
    codes[2 * i] = static_cast<std::int8_t>(static_cast<std::int8_t>(packed[i] << 4) >> 4);
    codes[2 * i + 1] = static_cast<std::int8_t>(packed[i] >> 4);
  }
}

/// Rows [begin, end) of W as numbers, by way of one code a byte: both loops are the compiler's to vectorise.
template <typename T>
void unpack_rows(T* out, const Matrix& w, std::int64_t begin, std::int64_t end) {
  constexpr std::int64_t kAtOnce = 1024;
  const PackedFormat& f = w.format;
  std::int8_t split[kAtOnce] = {};
  for (std::int64_t o = begin; o < end; ++o, out += f.columns) {
    const auto* packed = reinterpret_cast<const std::int8_t*>(w.row(o));
    const float* scales = w.row_scales(o);
    for (std::int64_t c = 0; c < f.columns;) {
      const std::int64_t first = c, last = first + kAtOnce < f.columns ? first + kAtOnce : f.columns;
      const std::int8_t* codes = packed + first;
      if (f.bits == 4) {
        split_bytes(split, packed + first / 2, (last - first + 1) / 2);
        codes = split;
      }
      while (c < last) {
        const std::int64_t group = c / f.group, group_end = (group + 1) * f.group;
        const T scale = scales[group];
        const std::int64_t here = group_end < last ? group_end : last;
        for (; c < here; ++c) out[c] = static_cast<T>(codes[c - first]) * scale;
      }
    }
  }
}

}  // namespace

void CpuBackend::linear_packed_forward(View y, ConstView x, const PackedView& w, const LinearShape& s) {
  const char* op = "linear_packed_forward";
  const PackedFormat& f = w.format;
  if (s.batch < 1) fail(op, "batch", s.batch, 1);
  check_packed_operand(op, f, s.in);
  const auto* codes = input<std::uint8_t>(op, "codes", w.codes, s.batch * s.out * f.row_bytes());
  const auto* scales = input<float>(op, "scales", w.scales, s.batch * s.out * f.groups());
  for_compute_type(op, x.dtype, [&](auto zero) {
    using T = decltype(zero);
    T* out = output<T>(op, "y", y, s.batch * s.rows * s.out);
    const T* in = input<T>(op, "x", x, s.x_size());
    if (s.rows * s.out == 0) return;
    const std::int64_t fits = 1 + kTileBytes / (s.in * static_cast<std::int64_t>(sizeof(T)));
    const std::int64_t tile = fits < s.out ? fits : s.out;
    for (std::int64_t e = 0; e < s.batch; ++e) {
      const Matrix matrix{codes + e * s.out * f.row_bytes(), scales + e * s.out * f.groups(), f};
      const T* rows = in + e * s.rows * s.x_row();
      T* to = out + e * s.rows * s.out;
      LinearShape one = s;
      one.batch = 1;
      if constexpr (sizeof(T) == sizeof(float)) {
        if (!options_.invariant && s.rows <= kFewRows &&
            (f.bits == 4 ? try_few_rows<4>(to, rows, matrix, one) : try_few_rows<8>(to, rows, matrix, one))) {
          flop_log.gemm(s.rows, s.out, s.in);
          continue;
        }
      }
      const bool is_whole = tile == s.out;
      const TileMemory memory(part_bytes<T>(tile * s.in) + (is_whole ? 0 : part_bytes<T>(tile * s.rows)));
      Parts parts(memory.data());
      T* const numbers = parts.take<T>(tile * s.in);
      T* const columns = is_whole ? to : parts.take<T>(tile * s.rows);
      for (std::int64_t o = 0; o < s.out; o += tile) {
        one.out = s.out - o < tile ? s.out - o : tile;
        parallel_for(one.out, 65536 / s.in + 1, [&](std::int64_t begin, std::int64_t end) {
          unpack_rows<T>(numbers + begin * s.in, matrix, o + begin, o + end);
        });
        linear_forward({columns, s.rows * one.out, x.dtype}, {rows, one.x_size(), x.dtype},
                       {numbers, one.out * s.in, x.dtype}, one);
        if (is_whole) continue;
        for (std::int64_t r = 0; r < s.rows; ++r) {
          __builtin_memcpy(to + r * s.out + o, columns + r * one.out,
                           static_cast<std::size_t>(one.out) * sizeof(T));
        }
      }
    }
  });
}

}  // namespace fathom::cpu::FATHOM_ISA
