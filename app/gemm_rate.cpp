#include "app/gemm_rate.h"

#include <algorithm>
#include <chrono>
#include <random>
#include <vector>

#include <cblas.h>

namespace fathom::app {

double gemm_rate(std::int64_t rows, std::int64_t in, std::int64_t out) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;  // zeros would be faster than numbers
  const auto filled = [&](std::int64_t n) {
    std::vector<float> v(static_cast<std::size_t>(n));
    for (float& x : v) x = normal(random);
    return v;
  };
  const std::vector<float> x = filled(rows * in);
  const std::vector<float> w = filled(out * in);
  std::vector<float> y(static_cast<std::size_t>(rows * out));
  const auto m = static_cast<int>(rows), n = static_cast<int>(out), k = static_cast<int>(in);
  double best = 1e30;  // seconds
  for (int i = 0; i < 20; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, 1.0F, x.data(), k, w.data(), k, 0.0F,
                y.data(), n);
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  }
  return 2.0 * static_cast<double>(rows * in * out) / best;
}

}  // namespace fathom::app
