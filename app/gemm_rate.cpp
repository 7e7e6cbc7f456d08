#include "app/gemm_rate.h"

#include <algorithm>
#include <random>
#include <vector>

#include <cblas.h>

#include "src/core/stopwatch.h"
#include "src/core/tensor.h"

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
    const Stopwatch watch;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, m, n, k, 1.0F, x.data(), k, w.data(), k, 0.0F,
                y.data(), n);
    best = std::min(best, watch.seconds());
  }
  return 2.0 * static_cast<double>(rows * in * out) / best;
}

double gemm_rate(Backend& backend, DType compute, std::int64_t rows, std::int64_t in, std::int64_t out) {
  if (backend.is_cpu()) return gemm_rate(rows, in, out);
  Allocator allocator{std::shared_ptr<Backend>(std::shared_ptr<void>(), &backend)};  // it outlives this call
  const auto filled = [&](std::int64_t n, std::uint64_t stream) {
    Tensor t(allocator.allocate(static_cast<std::size_t>(n) * size_of(compute), MemoryTag::Workspace), 0,
             Shape{n}, compute);
    backend.fill_normal(t, 1.0, 1, stream);
    return t;
  };
  const Tensor x = filled(rows * in, 1), w = filled(out * in, 2), y = filled(rows * out, 3);
  const LinearShape shape{rows, in, out};
  const auto run = [&](int times) {
    const Stopwatch watch;
    for (int i = 0; i < times; ++i) backend.linear_forward(y, x, w, shape);
    backend.synchronize();
    return watch.seconds() / times;
  };
  constexpr int kTimes = 20;
  run(2);
  double best = 1e30;
  for (int i = 0; i < 3; ++i) best = std::min(best, run(kTimes));
  return 2.0 * static_cast<double>(rows * in * out) / best;
}

double read_rate(Backend& backend) {
  Allocator allocator{std::shared_ptr<Backend>(std::shared_ptr<void>(), &backend)};  // it outlives this call
  const std::int64_t n = (backend.is_cpu() ? 256 : 1024) << 18;  // floats: several times any cache
  const auto room = [&](std::int64_t elements) {
    return Tensor(
        allocator.allocate(static_cast<std::size_t>(elements) * sizeof(float), MemoryTag::Workspace), 0,
        Shape{elements}, DType::F32);
  };
  const Tensor x = room(n), sum = room(1);
  backend.fill_normal(x, 1.0, 1, 1);
  double best = 1e30;
  const auto time = [&](auto&& read) {
    for (int i = 0; i < 10; ++i) {
      const Stopwatch watch;
      read();
      backend.synchronize();
      best = std::min(best, watch.seconds());
    }
  };
  time([&] { backend.sum(sum, x); });
  time([&] { backend.count_nonfinite(x); });
  return static_cast<double>(n) * sizeof(float) / best;
}

}  // namespace fathom::app
