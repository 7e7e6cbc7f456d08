// Rows of shares on a GPU, and what is asked of them, against the same on the CPU.
#include <algorithm>
#include <random>

#include <fmt/format.h>

#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

class CudaShares : public CudaKernels {
 protected:
  std::vector<Buffer> make(Backend& backend, const Buffer& logits, std::int64_t rows, std::int64_t vocab,
                           std::int64_t choices, double temperature) {
    return run_on(backend, {Buffer(DType::F64, rows * choices), logits},
                  [&](Backend& b, const std::vector<View>& v) {
                    b.make_shares(v[0], v[1], rows, vocab, choices, temperature);
                  });
  }
};

/// The same numbers in a type that the CPU computes in.
Buffer widened(const Buffer& from) {
  Buffer to(DType::F32, from.size());
  for (std::int64_t i = 0; i < from.size(); ++i) to.set(i, from[i]);
  return to;
}

TEST_F(CudaShares, AreTheCpus) {
  constexpr std::int64_t kRows = 7;
  for (const DType dtype : {DType::F32, DType::BF16}) {
    for (const std::int64_t vocab : {1, 31, 2048, 2053, 32768, 70001, 151936}) {
      const std::int64_t choices = vocab > 100 ? vocab - 5 : vocab;
      for (const double temperature : {1.0, 0.2, 3.0}) {
        SCOPED_TRACE(fmt::format("{} {} {}", name_of(dtype), vocab, temperature));
        Buffer logits = random(dtype, kRows * vocab, 1, 6.0);
        if (vocab > 1000) {
          logits.set(vocab + 700, NAN);           // row 1
          logits.set(2 * vocab + 900, INFINITY);  // row 2
          for (std::int64_t id = 0; id < vocab; ++id) logits.set(3 * vocab + id, -INFINITY);
          for (std::int64_t id = 0; id < 2048; ++id) logits.set(4 * vocab + id, -INFINITY);  // a part
          logits.set(5 * vocab + choices - 1, 500);
        }
        const Buffer exact = make(cpu(), widened(logits), kRows, vocab, choices, temperature)[0];
        const Buffer ours = make(cuda(), logits, kRows, vocab, choices, temperature)[0];
        const Buffer again = make(cuda(), logits, kRows, vocab, choices, temperature)[0];
        EXPECT_EQ(ours.bytes(), again.bytes());
        for (std::int64_t i = 0; i < ours.size(); ++i) {
          if (std::isnan(exact[i])) {
            ASSERT_TRUE(std::isnan(ours[i])) << i;
          } else {
            ASSERT_NEAR(ours[i], exact[i], 1e-11 * exact[i] + 1e-290) << i;
          }
        }
      }
    }
  }
}

/// Whether `token` is where the part `uniform` of all weights falls, to rounding.
void expect_drawn(const std::vector<double>& weights, double uniform, std::int32_t token) {
  ASSERT_GE(token, 0);
  ASSERT_LT(token, std::ssize(weights));
  double before = 0, total = 0;
  for (std::size_t id = 0; id < weights.size(); ++id) {
    if (std::cmp_less(id, token)) before += weights[id];
    total += weights[id];
  }
  const double own = weights[static_cast<std::size_t>(token)];
  EXPECT_GT(own, 0);
  EXPECT_GE(uniform, before / total - 1e-12);
  EXPECT_LE(uniform, (before + own) / total + 1e-12);
}

TEST_F(CudaShares, AnswerAsTheWeightsHaveIt) {
  std::mt19937 r(2);
  std::uniform_real_distribution<double> part(0, 1);
  for (const std::int64_t vocab : {1, 31, 32, 1000, 32768, 70001}) {
    constexpr std::int64_t kRows = 4;
    const Buffer rows = make(cpu(), random(DType::F32, kRows * vocab, 3, 4.0), kRows, vocab, vocab, 1.0)[0];
    const DeviceBuffer there(cuda(), rows);
    const auto row = [&](std::int64_t i) {
      return ConstView(static_cast<const double*>(there.view().data) + i * vocab, vocab, DType::F64);
    };
    std::vector<ShareQuestion> questions;
    std::vector<std::vector<double>> weights;
    for (int i = 0; i < 150; ++i) {  // more than a launch takes
      const std::int64_t p = i % kRows, q = (i / 4) % kRows;
      ShareQuestion asked{.p = row(p)};
      asked.uniform = i % 7 == 6 ? -1 : i % 11 == 0 ? 0.0 : i % 11 == 1 ? 1 - 0x1p-53 : part(r);
      if (i % 3 == 1) asked.q = row(q);
      if (i % 3 == 2) asked.certain = static_cast<std::int32_t>(i % vocab);
      if (i % 5 == 0) asked.id = static_cast<std::int32_t>((i * 37) % vocab);
      std::vector<double> all, own;
      for (std::int64_t id = 0; id < vocab; ++id) {
        own.push_back(rows[p * vocab + id]);
        const double other = i % 3 == 1                          ? rows[q * vocab + id]
                             : i % 3 == 2 && id == asked.certain ? 2.0
                                                                 : 0.0;
        all.push_back(std::max(0.0, own.back() - other));
      }
      const bool left = std::any_of(all.begin(), all.end(), [](double w) { return w > 0; });
      weights.push_back(left ? all : own);
      questions.push_back(asked);
    }
    std::vector<ShareQuestion> again = questions;
    cuda().ask_shares(questions, vocab);
    cuda().ask_shares(again, vocab);
    for (std::size_t i = 0; i < questions.size(); ++i) {
      SCOPED_TRACE(fmt::format("vocabulary {}, question {}", vocab, i));
      const ShareQuestion& q = questions[i];
      EXPECT_TRUE(q.finite);
      EXPECT_EQ(q.token, again[i].token);
      EXPECT_EQ(q.share, again[i].share);
      if (q.uniform < 0) {
        EXPECT_EQ(q.token, -1);
      } else {
        expect_drawn(weights[i], q.uniform, q.token);
      }
      const std::int32_t of = q.id >= 0 ? q.id : q.token;
      EXPECT_EQ(q.share, of >= 0 ? rows[static_cast<std::int64_t>(i) % kRows * vocab + of] : 0.0);
    }
  }
}

TEST_F(CudaShares, SayOfARowThatItIsNotFinite) {
  const Buffer rows(DType::F64, {0.5, 0.5, NAN, NAN});
  const DeviceBuffer there(cuda(), rows);
  const auto* from = static_cast<const double*>(there.view().data);
  std::vector<ShareQuestion> questions = {{.p = ConstView(from, 2, DType::F64), .uniform = 0.7},
                                          {.p = ConstView(from + 2, 2, DType::F64), .uniform = 0.7},
                                          {.p = ConstView(from + 2, 2, DType::F64), .id = 1}};
  cuda().ask_shares(questions, 2);
  EXPECT_TRUE(questions[0].finite);
  EXPECT_EQ(questions[0].token, 1);
  EXPECT_FALSE(questions[1].finite);
  EXPECT_FALSE(questions[2].finite);
}

}  // namespace
}  // namespace fathom::kernel_test
