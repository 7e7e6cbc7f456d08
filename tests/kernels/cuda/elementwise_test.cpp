// Elementwise kernels, sums, random numbers and the optimizer on the GPU.
#include <algorithm>

#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

class CudaElementwise : public CudaKernels {};

// Vectors, their ragged ends, and more than one block.
constexpr std::int64_t kSizes[] = {0, 1, 3, 8, 17, 255, 1024, 40001, 1 << 20};
constexpr DType kCompute[] = {DType::F32, DType::BF16};
constexpr double kBf16 = 8e-3;  // a unit of the last of 8 bits

const AdamWParams kDecaying{0.9, 0.95, 1e-8, 0.1};

/// UpdateNumbers of updates 1 to `steps`; number `unmade` is not to be made.
Buffer numbers(const AdamWParams& p, double scale, int steps, int unmade) {
  std::vector<double> all;
  for (int step = 1; step <= steps; ++step) {
    const UpdateNumbers n = update_numbers(p, 0.01, step, scale);
    all.insert(all.end(), {n.lr, n.bias1, n.root_bias2, n.gradient_scale, step == unmade ? 0.0 : 1.0});
  }
  return {DType::F64, all};
}

View numbers_of(const View& all, int step) {
  return {static_cast<double*>(all.data) + (step - 1) * kUpdateNumbers, kUpdateNumbers, DType::F64};
}

double rounding(DType t) { return t == DType::BF16 ? kBf16 : 2.4e-7; }

TEST_F(CudaElementwise, FillNormalIsTheSameOnEveryBackend) {
  for (const std::int64_t n : kSizes) {
    for (const std::uint64_t seed : {std::uint64_t{1}, std::uint64_t{0xfedcba9876543210}}) {
      // Angles near a right one cancel: cos is then of absolute accuracy, so the scale is the distribution's.
      const Op op = [&](Backend& b, const std::vector<View>& v) { b.fill_normal(v[0], 0.02, seed, 77); };
      const Buffer ours = run_on(cuda(), {{DType::F32, n}}, op)[0];
      const Buffer exact = run_on(cpu(), {{DType::F32, n}}, op)[0];
      for (std::int64_t i = 0; i < n; ++i) ASSERT_NEAR(ours[i], exact[i], 0.02 * 1e-6) << i << " of " << n;
      EXPECT_EQ(ours.bytes(), run_on(cuda(), {{DType::F32, n}}, op)[0].bytes());
    }
  }
}

TEST_F(CudaElementwise, FillNormalInBf16IsThatOfFp32Rounded) {
  constexpr std::int64_t kN = 1001;
  const Op op = [&](Backend& b, const std::vector<View>& v) { b.fill_normal(v[0], 1.0, 3, 4); };
  expect_near(run_on(cuda(), {{DType::BF16, kN}}, op)[0], run_on(cpu(), {{DType::F32, kN}}, op)[0], kBf16);
}

TEST_F(CudaElementwise, Cast) {
  for (const std::int64_t n : kSizes) {
    for (const DType from : kCompute) {
      for (const DType to : kCompute) {
        Buffer in = random(from, n, 1, 100.0);
        if (n > 16) {
          in.set(0, INFINITY), in.set(1, -INFINITY), in.set(2, std::nan("")), in.set(3, -0.0);
          in.set(4, 1.00390625), in.set(5, 1.01171875);  // ties, which go to the even one
          in.set(6, 3.4e38), in.set(7, 1e-40);
        }
        expect_as_on_the_cpu(
            {in, {to, n}}, [](Backend& b, const std::vector<View>& v) { b.cast(v[1], v[0]); }, 0);
      }
    }
  }
}

TEST_F(CudaElementwise, AddAccumulateScaleFillCopy) {
  for (const std::int64_t n : kSizes) {
    for (const DType t : kCompute) {
      const Buffer a = random(t, n, 1), b = random(t, n, 2);
      const std::vector<Buffer> after =
          run_on(cuda(), {a, b, {t, n}, a, a, {t, n}, {t, n}}, [](Backend& on, const std::vector<View>& v) {
            on.add(v[2], v[0], v[1]);
            on.accumulate(v[3], v[1]);
            on.scale(v[4], 0.3);
            on.fill(v[5], 0.7);
            on.copy(v[6], v[1]);
          });
      Buffer sum(t, n), scaled(t, n), filled(t, n, 0.7);
      for (std::int64_t i = 0; i < n; ++i) sum.set(i, a[i] + b[i]), scaled.set(i, a[i] * 0.3);
      expect_near(after[2], sum, rounding(t));
      expect_near(after[3], sum, rounding(t));
      expect_near(after[4], scaled, rounding(t));
      EXPECT_EQ(after[5].bytes(), filled.bytes());
      EXPECT_EQ(after[6].bytes(), b.bytes());
    }
  }
  expect_as_on_the_cpu(
      {{DType::I32, 1001}}, [](Backend& b, const std::vector<View>& v) { b.fill(v[0], -7); }, 0);
}

TEST_F(CudaElementwise, Sums) {
  for (const std::int64_t n : kSizes) {
    for (const DType t : kCompute) {
      const Buffer in = random(t, n, 1);
      const Op op = [](Backend& b, const std::vector<View>& v) {
        b.sum(v[1], v[0]);
        b.sum_squares(v[2], v[0]);
      };
      const std::vector<Buffer> buffers = {in, {DType::F32, 1}, {DType::F32, 1}};
      const std::vector<Buffer> ours = run_on(cuda(), buffers, op);
      EXPECT_EQ(ours[1].bytes(), run_on(cuda(), buffers, op)[1].bytes());
      EXPECT_EQ(ours[2].bytes(), run_on(cuda(), buffers, op)[2].bytes());
      double sum = 0, absolute = 0, squares = 0;
      for (std::int64_t i = 0; i < n; ++i)
        sum += in[i], absolute += std::fabs(in[i]), squares += in[i] * in[i];
      EXPECT_NEAR(ours[1][0], sum, 1e-6 * absolute) << n;
      EXPECT_NEAR(ours[2][0], squares, 4e-6 * squares) << n;
    }
  }
}

TEST_F(CudaElementwise, CountNonfinite) {
  for (const std::int64_t n : kSizes) {
    for (const DType t : kCompute) {
      Buffer in = random(t, n, 1);
      std::int64_t bad = 0;
      for (std::int64_t i = 0; i < n; i += 97, ++bad) {
        in.set(i, bad % 3 == 0 ? std::nan("") : bad % 3 == 1 ? INFINITY : -INFINITY);
      }
      run_on(cuda(), {in},
             [&](Backend& b, const std::vector<View>& v) { EXPECT_EQ(b.count_nonfinite(v[0]), bad); });
    }
  }
}

TEST_F(CudaElementwise, AdamW) {
  for (const std::int64_t n : kSizes) {
    for (const DType working : kCompute) {
      const Op steps = [&](Backend& b, const std::vector<View>& v) {
        for (int step = 1; step <= 4; ++step) {  // the fourth is not made
          // The CPU has no bf16 copy to write: it is compared below.
          b.adamw(v[0], b.is_cpu() ? View{} : v[1], v[2], v[3], v[4], numbers_of(v[5], step), kDecaying);
        }
      };
      const std::vector<Buffer> buffers = {random(DType::F32, n, 1),
                                           {working, n},
                                           {DType::F32, n},
                                           {DType::F32, n},
                                           random(DType::F32, n, 2, 0.1),
                                           numbers(kDecaying, 0.5, 4, 4)};
      const std::vector<Buffer> ours = run_on(cuda(), buffers, steps);
      const std::vector<Buffer> exact = run_on(cpu(), buffers, steps);
      for (std::int64_t i = 0; i < n; ++i) {
        // A step is of the size of lr, whatever the parameter's.
        ASSERT_NEAR(ours[0][i], exact[0][i], 1e-6 * std::fabs(exact[0][i]) + 1e-7) << i;
      }
      expect_near(ours[2], exact[2], 1e-6);
      expect_near(ours[3], exact[3], 1e-6);
      Buffer copy(working, n);
      for (std::int64_t i = 0; i < n; ++i) copy.set(i, ours[0][i]);
      EXPECT_EQ(ours[1].bytes(), copy.bytes()) << "the working copy is the master, rounded";
    }
  }
}

TEST_F(CudaElementwise, AdamWWithoutAWorkingCopy) {
  expect_as_on_the_cpu(
      {Buffer(DType::F32, 1001, 1.0),
       {DType::F32, 1001},
       {DType::F32, 1001},
       Buffer(DType::F32, 1001, 0.5),
       numbers({}, 1.0, 1, 2)},
      [&](Backend& b, const std::vector<View>& v) { b.adamw(v[0], View{}, v[1], v[2], v[3], v[4], {}); },
      1e-6);
}

// What the device decides is what the host decides when it reads the report: to the bit.
TEST_F(CudaElementwise, AStepIsJudgedAsOnTheHost) {
  const double nan = std::nan("");
  for (const std::int64_t parts : {1, 3, 17}) {
    for (const std::int64_t slots : {1, 6}) {
      for (const double loss : {2.0, 9.0, nan}) {
        for (const double steps : {0.0, 19.0, 20.0, 1000.0}) {
          for (const bool refuses : {false, true}) {
            StepRule rule{parts, slots, 768, 0.7, 1.7, refuses};
            Buffer losses = random(DType::F32, parts * slots, 5, 1.0);
            for (std::int64_t part = 0; part < parts; ++part) {
              losses.set(part * slots, 768 * (2.0 + 0.1 * losses[part * slots]));
            }
            if (std::isnan(loss)) {
              losses.set(parts * slots - 1, nan);
            } else {
              losses.set(0, 768 * loss * static_cast<double>(parts));
            }
            for (const double halted : {0.0, 1.0}) {
              const std::vector<Buffer> buffers = {
                  numbers({}, 1.0, 3, 4),
                  Buffer(DType::F64, {2.1234567890123, steps, halted}),
                  Buffer(DType::F32, 1, 7.0),
                  losses,
                  Buffer(DType::F32, {0.3, 0.71, 0.11}),
              };
              const Op judge = [&](Backend& b, const std::vector<View>& v) {
                b.judge_step(v[0], v[1], v[2], v[3], v[4], rule);
              };
              expect_as_on_the_cpu(buffers, judge, 0.0);
            }
          }
        }
      }
    }
  }
}

TEST_F(CudaElementwise, NormalNumbersOfAStreamThatTheDeviceKnows) {
  const auto offset = std::int64_t{77} << 16;
  const std::int64_t n = 1001;
  DeviceBuffer here(cuda(), Buffer(DType::F64, 1));  // 8 bytes
  cuda().copy_from_host(here.view().data, &offset, sizeof(offset));
  const Op told = [&](Backend& b, const std::vector<View>& v) {
    b.fill_normal(v[0], 1.0, 3, static_cast<std::uint64_t>(offset) + 5);
  };
  const Op found = [&](Backend& b, const std::vector<View>& v) {
    b.fill_normal_from(v[0], 1.0, {3, 5, {here.view().data, 1, DType::I64}, 0});
  };
  EXPECT_EQ(run_on(cuda(), {{DType::F32, n}}, told)[0].bytes(),
            run_on(cuda(), {{DType::F32, n}}, found)[0].bytes());
}

TEST_F(CudaElementwise, NormalNumbersFromTheMiddleOn) {
  for (const std::int64_t first : {0, 1, 2, 777}) {
    for (const std::int64_t n : {1, 2, 777, 1000}) {
      const Op op = [&](Backend& b, const std::vector<View>& v) {
        b.fill_normal_from(v[0], 1.0, {3, 4, {}, first});
      };
      const Buffer ours = run_on(cuda(), {{DType::F32, n}}, op)[0];
      const Buffer exact = run_on(cpu(), {{DType::F32, n}}, op)[0];
      for (std::int64_t i = 0; i < n; ++i) ASSERT_NEAR(ours[i], exact[i], 1e-6) << first << " " << i;
    }
  }
}

// Two copies under way, read in either order.
TEST_F(CudaElementwise, AReadbackIsOfItsMoment) {
  const std::int64_t n = 1001;
  DeviceBuffer x(cuda(), Buffer(DType::F32, n, 1.0));
  const auto first = cuda().make_readback(n * sizeof(float)),
             second = cuda().make_readback(n * sizeof(float));
  for (int round = 0; round < 3; ++round) {
    cuda().fill(x.view(), 2.0 + round);
    first->begin(x.view().data);
    cuda().fill(x.view(), 12.0 + round);
    second->begin(x.view().data);
    cuda().fill(x.view(), 0.0);
    const auto last = [](const void* data) { return static_cast<const float*>(data)[1000]; };
    if (round == 1) {
      EXPECT_EQ(last(second->wait()), 13.0F);
    }
    EXPECT_EQ(last(first->wait()), 2.0F + static_cast<float>(round));
    EXPECT_EQ(last(second->wait()), 12.0F + static_cast<float>(round));
  }
}

}  // namespace
}  // namespace fathom::kernel_test
