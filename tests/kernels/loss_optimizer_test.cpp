#include "kernel_suite.h"

namespace fathom::kernel_test {
namespace {

using Values = std::vector<double>;

class LossOptimizer : public KernelSuite {};
INSTANTIATE_TEST_SUITE_P(Cpu, LossOptimizer, ::testing::ValuesIn(cases()), name_of_case);

View view_of(UpdateNumbers& numbers) { return {&numbers, kUpdateNumbers, DType::F64}; }

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

TEST_P(LossOptimizer, CrossEntropy) {
  for (const std::int64_t rows : {1, 5, 130}) {
    for (const std::int64_t vocab : {1, 3, 17, 64, 1000}) {
      on_threads([&](Backend& b) {
        const Buffer logits = random(dtype(), rows * vocab, 1, 5.0);
        Buffer targets(DType::I32, rows), losses(dtype(), rows), gradient(dtype(), rows * vocab);
        for (std::int64_t i = 0; i < rows; ++i) {
          targets.set(i, i % 4 == 3 ? -1.0 : static_cast<double>(i * 31 % vocab));
        }
        b.cross_entropy(losses.view(), gradient.view(), logits.view(), targets.view(), rows, vocab, 0.25);
        Buffer in_place = logits, losses2(dtype(), rows), losses3(dtype(), rows);
        b.cross_entropy(losses2.view(), in_place.view(), in_place.view(), targets.view(), rows, vocab, 0.25);
        b.cross_entropy(losses3.view(), View{}, logits.view(), targets.view(), rows, vocab, 0.25);
        EXPECT_EQ(in_place.bytes(), gradient.bytes());
        EXPECT_EQ(losses2.bytes(), losses.bytes());
        Values rl(at(rows), 0.0), rg(at(rows * vocab), 0.0);
        for (std::int64_t i = 0; i < rows; ++i) {
          if (targets[i] < 0) continue;
          double most = -INFINITY, total = 0;
          for (std::int64_t j = 0; j < vocab; ++j) most = std::max(most, logits[i * vocab + j]);
          for (std::int64_t j = 0; j < vocab; ++j) total += std::exp(logits[i * vocab + j] - most);
          const std::int64_t hit = i * vocab + static_cast<std::int64_t>(targets[i]);
          rl[at(i)] = std::log(total) + most - logits[hit];
          for (std::int64_t j = 0; j < vocab; ++j) {
            rg[at(i * vocab + j)] = 0.25 * std::exp(logits[i * vocab + j] - most) / total;
          }
          rg[at(hit)] -= 0.25;
        }
        expect_close(losses, rl, tolerance(4), "losses");
        expect_close(losses3, rl, tolerance(4), "losses without gradient");
        expect_close(gradient, rg, tolerance(8), "gradient");
        return std::vector<Buffer>{losses, gradient, losses3};
      });
    }
  }
}

TEST_P(LossOptimizer, CrossEntropyAtTheEnds) {
  const double nan = std::nan("");
  const Buffer logits(dtype(), {1e30, -1e30, 0, 500, 499, -INFINITY, 1, nan, 2});
  const Buffer targets = integers({0, 1, 2});
  Buffer losses(dtype(), 3), gradient(dtype(), 9);
  backend()->cross_entropy(losses.view(), gradient.view(), logits.view(), targets.view(), 3, 3, 1.0);
  const double p = sigmoid(1.0);
  expect_close(losses, {0, 1 + std::log1p(std::exp(-1)), nan}, tolerance(4), "losses");
  expect_close(gradient, {0, 0, 0, p, -p, 0, nan, nan, nan}, tolerance(4), "gradient");
}

TEST_P(LossOptimizer, AdamWFollowsItsFormula) {
  for (const std::int64_t n : {0, 1, 3, 17, 40001}) {
    on_threads([&](Backend& b) {
      Buffer master = random(dtype(), n, 1), working(dtype(), n), m(dtype(), n), v(dtype(), n);
      Values p(at(n)), rm(at(n), 0.0), rv(at(n), 0.0);
      for (std::int64_t i = 0; i < n; ++i) p[at(i)] = master[i];
      for (int step = 1; step <= 3; ++step) {
        const Buffer g = random(dtype(), n, static_cast<unsigned>(10 + step), 0.1);
        const AdamWParams a{0.9, 0.95, 1e-8, 0.1};
        UpdateNumbers now = update_numbers(a, 0.01, step, 0.5);
        b.adamw(master.view(), working.view(), m.view(), v.view(), g.view(), view_of(now), a);
        const std::vector<Buffer> before{master, working, m, v};
        now.applied = 0;
        b.adamw(master.view(), working.view(), m.view(), v.view(), g.view(), view_of(now), a);
        const std::vector<Buffer> after{master, working, m, v};
        for (std::size_t i = 0; i < before.size(); ++i) {
          EXPECT_EQ(before[i].bytes(), after[i].bytes()) << "an update that is not made changes nothing";
        }
        for (std::int64_t i = 0; i < n; ++i) {
          const double gi = g[i] * 0.5;
          rm[at(i)] = 0.9 * rm[at(i)] + 0.1 * gi;
          rv[at(i)] = 0.95 * rv[at(i)] + 0.05 * gi * gi;
          const double root = std::sqrt(rv[at(i)]) / std::sqrt(1 - std::pow(0.95, step));
          p[at(i)] *= 1 - 0.01 * 0.1;
          p[at(i)] -= 0.01 / (1 - std::pow(0.9, step)) * rm[at(i)] / (root + 1e-8);
        }
      }
      expect_close(master, p, tolerance(8), "master");
      expect_close(m, rm, tolerance(8), "m");
      expect_close(v, rv, tolerance(8), "v");
      EXPECT_EQ(master.bytes(), n == 0 ? master.bytes() : working.bytes());
      return std::vector<Buffer>{master, working, m, v};
    });
  }
}

// Losses of 2 micro-batches of 3 losses and 10 tokens each: 3 and 4 nats a token.
TEST_P(LossOptimizer, AStepIsJudgedByItsLossesAndNorms) {
  const double nan = std::nan(""), infinite = INFINITY;
  const StepRule rule{2, 3, 10, 2.0, 1.5, true};
  struct Case {
    double last_loss, square, steps, mean, halted;
    bool goes;
  };
  for (const Case& c :
       {Case{1, 9, 0, 0, 0, true}, Case{1, 9, 19, 1, 0, true}, Case{1, 9, 20, 1, 0, false},
        Case{1, 9, 20, 3, 0, true}, Case{1, 9, 20, 3, 1, false}, Case{nan, 9, 0, 0, 0, false},
        Case{infinite, 9, 0, 0, 0, false}, Case{1, nan, 0, 0, 0, false}, Case{1, infinite, 0, 0, 0, false}}) {
    UpdateNumbers groups[kClipGroups];
    LossMean mean{c.mean, c.steps, c.halted};
    const Buffer losses(dtype(), {30, 1, 1, 40, 1, c.last_loss}), squares(dtype(), {c.square, 16, 1});
    Buffer applied(dtype(), 1, 7.0);
    backend()->judge_step({groups, kClipGroups * kUpdateNumbers, DType::F64},
                          {&mean, kLossMeanNumbers, DType::F64}, applied.view(), losses.view(),
                          squares.view(), rule);
    EXPECT_EQ(applied[0], c.goes ? 1.0 : 0.0);
    EXPECT_EQ(mean.halted, c.goes ? 0.0 : 1.0);
    EXPECT_EQ(mean.steps, c.steps + (c.goes ? 1 : 0));
    EXPECT_DOUBLE_EQ(mean.mean, c.goes ? c.mean + (3.5 - c.mean) / mean.steps : c.mean);
    for (std::int64_t g = 0; g < kClipGroups; ++g) {
      EXPECT_EQ(groups[g].applied, c.goes ? 1.0 : 0.0);
      if (!c.goes) continue;
      EXPECT_EQ(groups[g].gradient_scale, g < 2 ? 2.0 / 5.0 : 1.0);
    }
  }
}

// A rule that warns of spikes refuses only what is not finite.
TEST_P(LossOptimizer, ASpikeThatIsWarnedOfIsApplied) {
  UpdateNumbers groups[kClipGroups];
  LossMean mean{1.0, 100, 0};
  const Buffer losses(dtype(), 1, 30.0), squares(dtype(), 3, 1.0);
  Buffer applied(dtype(), 1);
  backend()->judge_step({groups, kClipGroups * kUpdateNumbers, DType::F64},
                        {&mean, kLossMeanNumbers, DType::F64}, applied.view(), losses.view(), squares.view(),
                        {1, 1, 10, 0, 1.5, false});
  EXPECT_EQ(applied[0], 1.0);
  EXPECT_DOUBLE_EQ(mean.mean, 1.0 + 0.02 * 2.0);
  EXPECT_EQ(groups[0].gradient_scale, 1.0) << "0: nothing is clipped";
}

TEST_P(LossOptimizer, Refusals) {
  const auto b = backend();
  Buffer logits(dtype(), 6), losses(dtype(), 2), targets = integers({0, 3}), index(DType::I32, 2);
  expect_error([&] { b->cross_entropy(losses.view(), View{}, logits.view(), targets.view(), 2, 3, 1); },
               "cross_entropy", "target: got 3, expected 2");
  expect_error([&] { b->cross_entropy(losses.view(), losses.view(), logits.view(), index.view(), 2, 3, 1); },
               "cross_entropy", "gradient: got 2, expected 6");
  UpdateNumbers now;
  expect_error(
      [&] { b->adamw(logits.view(), View{}, losses.view(), logits.view(), logits.view(), view_of(now), {}); },
      "adamw", "m: got 2, expected 6");
  expect_error(
      [&] {
        b->adamw(logits.view(), View{}, logits.view(), logits.view(), logits.view(), losses.view(), {});
      },
      "adamw", "numbers: got 2, expected 5");
}

}  // namespace
}  // namespace fathom::kernel_test
