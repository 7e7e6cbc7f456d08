// Rows of shares and what is asked of them, against sums in the order of the ids.
#include <cmath>
#include <limits>

#include "kernel_suite.h"

namespace fathom::kernel_test {
namespace {

class Shares : public KernelSuite {};
INSTANTIATE_TEST_SUITE_P(Cpu, Shares, ::testing::ValuesIn(cases()), name_of_case);

TEST_P(Shares, AreTheSoftmaxAtATemperature) {
  for (const std::int64_t rows : {1, 5}) {
    for (const std::int64_t vocab : {1, 3, 100, 5000}) {
      const std::int64_t choices = vocab > 4 ? vocab - 3 : vocab;
      for (const double temperature : {1.0, 0.3, 4.0}) {
        Buffer logits = random(dtype(), rows * vocab, 1, 5.0);
        if (vocab > 4) logits.set(2, -INFINITY);
        on_threads([&](Backend& b) {
          Buffer shares(DType::F64, rows * choices);
          b.make_shares(shares.view(), logits.view(), rows, vocab, choices, temperature);
          for (std::int64_t row = 0; row < rows; ++row) {
            double sum = 0, total = 0;
            for (std::int64_t id = 0; id < choices; ++id) {
              sum += shares[row * choices + id];
              total += std::exp(logits[row * vocab + id] / temperature);
            }
            EXPECT_NEAR(sum, 1, 1e-12);
            for (std::int64_t id = 0; id < choices; ++id) {
              const double e = std::exp(logits[row * vocab + id] / temperature) / total;
              EXPECT_NEAR(shares[row * choices + id], e, 1e-12 * e);
            }
          }
          return std::vector<Buffer>{shares};
        });
      }
    }
  }
}

TEST_P(Shares, AreNotThereOfARowThatIsNotFinite) {
  const double inf = INFINITY;
  const Buffer logits(dtype(), {1, 2, 3, 1, std::nan(""), 3, 1, inf, 3, -inf, -inf, -inf, -inf, 5, -inf});
  Buffer shares(DType::F64, 15);
  const auto b = backend();
  b->make_shares(shares.view(), logits.view(), 5, 3, 3, 1.0);
  std::vector<ShareQuestion> questions;
  for (std::int64_t row = 0; row < 5; ++row) {
    const auto* from = static_cast<const double*>(shares.view().data) + row * 3;
    questions.push_back({.p = ConstView(from, 3, DType::F64), .uniform = 0.5});
  }
  b->ask_shares(questions, 3);
  EXPECT_TRUE(questions[0].finite);
  for (const std::size_t row : {1U, 2U, 3U}) EXPECT_FALSE(questions[row].finite) << row;
  EXPECT_TRUE(questions[4].finite);
  EXPECT_EQ(questions[4].token, 1);
  EXPECT_EQ(questions[4].share, 1);
}

TEST_P(Shares, AnswerWhatIsAsked) {
  const Buffer p(DType::F64, {0.5, 0.0, 0.2, 0.3}), q(DType::F64, {0.1, 0.0, 0.4, 0.5});
  const auto b = backend();
  const auto ask = [&](ShareQuestion question) {
    question.p = p.view();
    b->ask_shares({&question, 1}, 4);
    EXPECT_TRUE(question.finite);
    return question;
  };
  EXPECT_EQ(ask({.id = 2}).share, 0.2);
  EXPECT_EQ(ask({.id = 2}).token, -1);
  EXPECT_EQ(ask({}).share, 0);
  // Never the one that cannot come, the ends included.
  const double last = 1 - 1e-16;
  for (const auto& [uniform, token] :
       std::vector<std::pair<double, int>>{{0, 0}, {0.49, 0}, {0.51, 2}, {0.69, 2}, {0.71, 3}, {last, 3}}) {
    EXPECT_EQ(ask({.uniform = uniform}).token, token) << uniform;
    EXPECT_EQ(ask({.uniform = uniform}).share, p[token]) << uniform;
  }
  EXPECT_EQ(ask({.id = 3, .uniform = 0}).share, 0.3);
  // What another row leaves: 0.4 of the first.
  for (const double uniform : {0.0, 0.5, last}) EXPECT_EQ(ask({.q = q.view(), .uniform = uniform}).token, 0);
  // Without the first the others share: 0.2 and 0.3.
  EXPECT_EQ(ask({.certain = 0, .uniform = 0.39}).token, 2);
  EXPECT_EQ(ask({.certain = 0, .uniform = 0.41}).token, 3);
  // Nothing is left: p's own.
  EXPECT_EQ(ask({.q = p.view(), .uniform = 0.6}).token, 2);
  const Buffer one(DType::F64, {0.0, 0.0, 1.0, 0.0});
  ShareQuestion alone{.p = one.view(), .certain = 2, .uniform = 0.3};
  b->ask_shares({&alone, 1}, 4);
  EXPECT_EQ(alone.token, 2);
}

TEST_P(Shares, RefuseWhatContradictsTheRows) {
  const Buffer p(DType::F64, {0.5, 0.5}), wrong(DType::F32, {0.5, 0.5}), longer(DType::F64, {0, 0, 1});
  const auto refused = [&](ShareQuestion q, const char* word) {
    expect_error([&] { backend()->ask_shares({&q, 1}, 2); }, "ask_shares", word);
  };
  refused({}, "p is no row");
  refused({.p = wrong.view()}, "p is no row");
  refused({.p = p.view(), .q = longer.view()}, "q is no row");
  refused({.p = p.view(), .id = 2}, "none of the choices");
  refused({.p = p.view(), .uniform = 1}, "uniform");
  refused({.p = p.view(), .q = p.view(), .certain = 1}, "q and an id");
  Buffer shares(DType::F64, 2);
  const Buffer logits(dtype(), {1, 2});
  expect_error([&] { backend()->make_shares(shares.view(), logits.view(), 1, 2, 3, 1); }, "make_shares",
               "choices");
  for (const double temperature : {0.0, -1.0, std::numeric_limits<double>::infinity(), std::nan("")}) {
    expect_error([&] { backend()->make_shares(shares.view(), logits.view(), 1, 2, 2, temperature); },
                 "make_shares", "temperature");
  }
  expect_error([&] { backend()->make_shares(shares.view(), logits.view(), 2, 2, 2, 1); }, "make_shares",
               "size");
}

}  // namespace
}  // namespace fathom::kernel_test
