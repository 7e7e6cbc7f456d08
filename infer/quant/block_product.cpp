#include "infer/quant/block_product.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string_view>

namespace fathom {

namespace {

constexpr std::int64_t kRun = 128;      // of k: what a panel of b holds
constexpr int kRows = 4, kVectors = 2;  // of c, whose sums are in registers

struct Product {
  double* c;
  std::int64_t c_row;
  const double* a;
  std::int64_t a_row;
  const double* b;
  std::int64_t b_row, m, n, k;
  double sign;
};

/// A run of k. Inlined into one copy for each width of vectors.
template <int lanes>
[[gnu::always_inline]] inline void run_product(const Product& p) {
  using Vec [[gnu::vector_size(lanes * sizeof(double))]] = double;
  constexpr std::int64_t kWidth = kVectors * lanes;
  alignas(64) double panel[kRun * kWidth];  // columns of b, side by side for the caches' sake
  for (std::int64_t j = 0; j < p.n; j += kWidth) {
    const std::int64_t width = std::min(kWidth, p.n - j);
    for (std::int64_t t = 0; t < p.k; ++t) {
      for (std::int64_t l = 0; l < width; ++l) panel[t * kWidth + l] = p.b[t * p.b_row + j + l];
      for (std::int64_t l = width; l < kWidth; ++l) panel[t * kWidth + l] = 0;
    }
    for (std::int64_t i = 0; i < p.m; i += kRows) {
      // Rows past the last one repeat it, and are not stored.
      const std::int64_t rows = std::min<std::int64_t>(kRows, p.m - i);
      const double* a[kRows];
      for (int r = 0; r < kRows; ++r) a[r] = p.a + i + std::min<std::int64_t>(r, rows - 1);
      Vec sum[kRows][kVectors] = {};
      for (std::int64_t t = 0; t < p.k; ++t) {
        Vec b[kVectors];
        std::memcpy(b, panel + t * kWidth, sizeof(b));
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) sum[r][v] += a[r][t * p.a_row] * b[v];
        }
      }
      double sums[kRows][kWidth];
      std::memcpy(sums, sum, sizeof(sums));
      for (std::int64_t r = 0; r < rows; ++r) {
        double* to = p.c + (i + r) * p.c_row + j;
        for (std::int64_t l = 0; l < width; ++l) to[l] += p.sign * sums[r][l];
      }
    }
  }
}

void run_portable(const Product& p) { run_product<2>(p); }
#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] void run_avx2(const Product& p) { run_product<4>(p); }
[[gnu::target("avx512f,avx2,fma")]] void run_avx512(const Product& p) { run_product<8>(p); }
#endif

using Run = void (*)(const Product&);

Run run_for_this_processor() {
  const char* given = std::getenv("FATHOM_ISA");
  const std::string_view wanted = given == nullptr ? "" : given;
#if defined(__x86_64__)
  if ((wanted.empty() || wanted == "avx512") && __builtin_cpu_supports("avx512f")) return run_avx512;
  if (wanted != "portable" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return run_avx2;
#endif
  return run_portable;
}

}  // namespace

void block_product(Sign sign, double* c, std::int64_t c_row, const double* a, std::int64_t a_row,
                   const double* b, std::int64_t b_row, std::int64_t m, std::int64_t n, std::int64_t k) {
  const Run run = run_for_this_processor();
  for (std::int64_t t = 0; t < k; t += kRun)
    run({c, c_row, a + t * a_row, a_row, b + t * b_row, b_row, m, n, std::min(kRun, k - t),
         sign == Sign::Add ? 1.0 : -1.0});
}

}  // namespace fathom
