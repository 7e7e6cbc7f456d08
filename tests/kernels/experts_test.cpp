#include <algorithm>

#include "kernel_suite.h"

namespace fathom::kernel_test {
namespace {

using Values = std::vector<double>;

class Experts : public KernelSuite {};
INSTANTIATE_TEST_SUITE_P(Cpu, Experts, ::testing::ValuesIn(cases()), name_of_case);

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

Values all_of(const Buffer& b) {
  Values v;
  for (std::int64_t i = 0; i < b.size(); ++i) v.push_back(b[i]);
  return v;
}

TEST_P(Experts, AffinityIsTheTransposedSoftmax) {
  for (const auto& [rows, choices] : std::vector<RowsWidth>{{1, 1}, {5, 3}, {130, 8}, {33, 40}, {0, 4}}) {
    on_threads([&, rows = rows, choices = choices](Backend& b) {
      Buffer logits = random(dtype(), rows * choices, 3, 4.0);
      if (rows > 2) logits.set(2 * choices, 300.0);  // its exponential alone would overflow
      Buffer affinity(dtype(), rows * choices, 7), lse(dtype(), rows, 7);
      b.expert_affinity_forward(affinity.view(), lse.view(), logits.view(), rows, choices);
      Values p(at(rows * choices)), l(at(rows));
      for (std::int64_t n = 0; n < rows; ++n) {
        double most = -INFINITY, sum = 0;
        for (std::int64_t e = 0; e < choices; ++e) most = std::max(most, logits[n * choices + e]);
        for (std::int64_t e = 0; e < choices; ++e) sum += std::exp(logits[n * choices + e] - most);
        for (std::int64_t e = 0; e < choices; ++e) {
          p[at(e * rows + n)] = std::exp(logits[n * choices + e] - most) / sum;
        }
        l[at(n)] = most + std::log(sum);
      }
      expect_close(affinity, p, tolerance(), "affinity");
      expect_close(lse, l, tolerance(), "lse");
      return std::vector<Buffer>{affinity, lse};
    });
  }
}

TEST_P(Experts, ScoresAreTheTransposedLogits) {
  for (const auto& [rows, choices] : std::vector<RowsWidth>{{1, 1}, {5, 3}, {130, 8}, {33, 40}, {0, 4}}) {
    on_threads([&, rows = rows, choices = choices](Backend& b) {
      const Buffer logits = random(dtype(), rows * choices, 3), bias = random(dtype(), choices, 4),
                   dscores = random(dtype(), rows * choices, 5);
      Buffer scores(dtype(), rows * choices, 7), plain = scores, dlogits = scores;
      Buffer dbias(dtype(), choices, 2);  // added to
      b.choice_scores_forward(scores.view(), logits.view(), bias.view(), rows, choices);
      b.choice_scores_forward(plain.view(), logits.view(), View{}, rows, choices);
      b.choice_scores_backward(dlogits.view(), dbias.view(), dscores.view(), rows, choices);
      Values transposed(at(rows * choices)), biased = transposed, back = transposed, sums(at(choices), 2.0);
      for (std::int64_t n = 0; n < rows; ++n) {
        for (std::int64_t e = 0; e < choices; ++e) {
          transposed[at(e * rows + n)] = logits[n * choices + e];
          biased[at(e * rows + n)] = logits[n * choices + e] + bias[e];
          back[at(n * choices + e)] = dscores[e * rows + n];
          sums[at(e)] += dscores[e * rows + n];
        }
      }
      EXPECT_EQ(all_of(plain), transposed);
      EXPECT_EQ(all_of(dlogits), back);
      expect_close(scores, biased, tolerance(), "scores");
      expect_close(dbias, sums, tolerance(), "dbias");
      return std::vector<Buffer>{scores, plain, dlogits, dbias};
    });
  }
}

TEST_P(Experts, SlotsAreTheInverseOfRows) {
  // Three experts with two slots each, over four rows.
  const Buffer indices = integers({1, 3, 4 + 0, 4 + 1, 8 + 1, 8 + 2});
  Buffer rows(DType::I32, 6), slots(DType::I32, 12);
  backend()->expert_slots(rows.view(), slots.view(), indices.view(), {.rows = 4, .experts = 3, .slots = 2});
  EXPECT_EQ(all_of(rows), (Values{1, 3, 0, 1, 1, 2}));
  EXPECT_EQ(all_of(slots), (Values{-1, 0, -1, 1, 2, 3, -1, -1, -1, 4, 5, -1}));
}

// Row 1 is in three slots, row 0 in one, row 3 in none; expert 1 has an empty slot.
const ExpertShape kShape{.rows = 4, .experts = 3, .slots = 2, .width = 2};
Buffer rows_of_slots() { return integers({1, 2, 1, -1, 0, 1}); }
Buffer slots_of_rows() { return integers({-1, 0, 1, -1, -1, 2, -1, -1, 4, 5, -1, -1}); }

TEST_P(Experts, GatherGivesZerosForAnEmptySlot) {
  const Buffer x(dtype(), {1, 2, 3, 4, 5, 6, 7, 8});
  Buffer out(dtype(), 12, 9);
  backend()->expert_gather_forward(out.view(), x.view(), rows_of_slots().view(), kShape);
  EXPECT_EQ(all_of(out), (Values{3, 4, 5, 6, 3, 4, 0, 0, 1, 2, 3, 4}));
  const Buffer dout(dtype(), {1, 2, 3, 4, 5, 6, 100, 100, 7, 8, 9, 10});
  Buffer dx(dtype(), 8, 9);
  backend()->expert_gather_backward(dx.view(), dout.view(), slots_of_rows().view(), kShape);
  EXPECT_EQ(all_of(dx), (Values{7, 8, 1 + 5 + 9, 2 + 6 + 10, 3, 4, 0, 0}));
}

TEST_P(Experts, CombineSumsTheSlotsOfARow) {
  const Buffer f(dtype(), {1, 2, 3, 4, 5, 6, 100, 100, 7, 8, 9, 10});
  const Buffer weights(dtype(), {0, 2, 3, 0, 0, 4, 0, 0, 5, 6, 0, 0});
  Buffer y(dtype(), 8, 9);
  backend()->expert_combine_forward(y.view(), f.view(), weights.view(), slots_of_rows().view(), kShape);
  EXPECT_EQ(all_of(y), (Values{35, 40, 2 + 20 + 54, 4 + 24 + 60, 9, 12, 0, 0}));
  const Buffer dy(dtype(), {1, 2, 3, 4, 5, 6, 7, 8});
  Buffer df(dtype(), 12, 9), dweights(dtype(), 12, 9);
  backend()->expert_combine_backward(df.view(), dweights.view(), dy.view(), f.view(), weights.view(),
                                     rows_of_slots().view(), kShape);
  EXPECT_EQ(all_of(df), (Values{6, 8, 15, 18, 12, 16, 0, 0, 5, 10, 18, 24}));
  EXPECT_EQ(all_of(dweights), (Values{0, 3 + 8, 15 + 24, 0, 0, 15 + 24, 0, 0, 7 + 16, 27 + 40, 0, 0}));
}

// The sum over experts is the same whoever computes it, and with many rows.
TEST_P(Experts, CombineDoesNotDependOnThreads) {
  const ExpertShape s{.rows = 300, .experts = 5, .slots = 120, .width = 33};
  on_threads([&](Backend& b) {
    Buffer indices(DType::I32, s.experts * s.slots), rows = indices, slots(DType::I32, s.experts * s.rows);
    for (std::int64_t i = 0; i < indices.size(); ++i) {
      const std::int64_t e = i / s.slots;
      indices.set(i, static_cast<double>(e * s.rows + (i % s.slots * 2 + e) % s.rows));
    }
    b.expert_slots(rows.view(), slots.view(), indices.view(), s);
    const Buffer f = random(dtype(), s.experts * s.slots * s.width, 1),
                 dy = random(dtype(), s.rows * s.width, 2);
    const Buffer weights = random(dtype(), s.experts * s.rows, 3);
    Buffer y(dtype(), s.rows * s.width), df(dtype(), f.size()), dweights(dtype(), weights.size());
    b.expert_combine_forward(y.view(), f.view(), weights.view(), slots.view(), s);
    b.expert_combine_backward(df.view(), dweights.view(), dy.view(), f.view(), weights.view(), rows.view(),
                              s);
    return std::vector<Buffer>{rows, slots, y, df, dweights};
  });
}

TEST_P(Experts, Statistics) {
  // Two experts and two no-ops over four rows. Row 0: both experts; row 1: expert 0; rows 2 and 3: none.
  const Buffer slots = integers({0, 1, -1, -1, 2, -1, -1, -1});
  const Buffer affinity(dtype(),
                        {0.5, 0.25, 0, 0.25, 0.25, 0.25, 0, 0.25, 0.25, 0.25, 1, 0.5, 0, 0.25, 0, 0});
  // Row 2 wanted expert 1 and had no slot there, row 3 a no-op.
  const Buffer weights(dtype(), {0.6, 1, 0, 0, 0.4, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0});
  Buffer out(dtype(), 8, 9);
  const ExpertShape s{.rows = 4, .experts = 2, .slots = 2};
  const double half = std::log(2.0);
  for (const ConstView& w : {ConstView(weights.view()), ConstView()}) {
    backend()->expert_statistics(out.view(), affinity.view(), w, slots.view(), 4, s);
    // Busiest 2, idlest 1, of 1.5 on average; equal affinities are the first choice's.
    expect_close(out,
                 {0.5, 0.75, w ? 0.2 : 0.0, 4.0 / 3, 2.0 / 3, (0.25 + 0.5 + 1 + 0.5) / 4, 0.5,
                  (1.5 * half + 2 * half + 0 + 1.5 * half) / 4},
                 tolerance(), "statistics");
  }
}

TEST_P(Experts, TokensChooseTheLargestAndTiesGoToTheLower) {
  // Three choices over three rows: clear, all equal, the last two equal.
  const Buffer affinity(dtype(), {0.5, 0.25, 0.2, 0.3, 0.25, 0.4, 0.2, 0.25, 0.4});
  Buffer weights(dtype(), 9, 7);
  backend()->token_choice_forward(weights.view(), affinity.view(), 3, 3, 1);
  expect_close(weights, {0.5, 0.25, 0, 0, 0, 0.4, 0, 0, 0}, tolerance(), "top 1");
  backend()->token_choice_forward(weights.view(), affinity.view(), 3, 3, 2);
  expect_close(weights, {0.5 / 0.8, 0.5, 0, 0.3 / 0.8, 0.5, 0.5, 0, 0, 0.5}, tolerance(), "top 2");
  backend()->token_choice_forward(weights.view(), affinity.view(), 3, 3, 3);
  expect_close(weights, {0.5, 1.0 / 3, 0.2, 0.3, 1.0 / 3, 0.4, 0.2, 1.0 / 3, 0.4}, tolerance(), "all");
}

TEST_P(Experts, SlotsFillInTheOrderOfRowsWithinEachSequence) {
  // Two experts, two sequences of three rows, two slots each: row 2 is one too many for expert 0.
  const Buffer weights(dtype(), {1, 0.5, 0.5, 0, 0, 1, 0, 0.5, 0.5, 0, 0, 0});
  Buffer rows(DType::I32, 8), slots(DType::I32, 12);
  const ExpertShape s{.rows = 6, .experts = 2, .slots = 4};
  backend()->expert_fill(rows.view(), slots.view(), weights.view(), 3, s);
  EXPECT_EQ(all_of(rows), (Values{0, 1, 5, -1, 1, 2, -1, -1}));
  EXPECT_EQ(all_of(slots), (Values{0, 1, -1, -1, -1, 2, -1, 4, 5, -1, -1, -1}));
}

TEST_P(Experts, LongSequencesFillTheSame) {
  on_threads([&](Backend& b) {
    const std::int64_t seq = 700, sequences = 3, capacity = 150;
    const ExpertShape s{.rows = seq * sequences, .experts = 4, .slots = sequences * capacity};
    const Buffer affinity = random(dtype(), s.rows * 4, 5);
    Buffer positive(dtype(), s.rows * 4), weights = positive;
    for (std::int64_t i = 0; i < positive.size(); ++i) positive.set(i, std::exp(affinity[i]));
    b.token_choice_forward(weights.view(), positive.view(), s.rows, 4, 2);
    Buffer rows(DType::I32, s.experts * s.slots), slots(DType::I32, s.experts * s.rows);
    b.expert_fill(rows.view(), slots.view(), weights.view(), seq, s);
    for (std::int64_t e = 0; e < 4; ++e) {
      for (std::int64_t n = 0, taken = 0; n < s.rows; ++n) {
        if (n % seq == 0) taken = 0;
        const bool chosen = weights[e * s.rows + n] > 0;
        const std::int64_t sequence = e * sequences + n / seq;
        const double expected =
            chosen && taken < capacity ? static_cast<double>(sequence * capacity + taken) : -1.0;
        EXPECT_EQ(slots[e * s.rows + n], expected);
        if (expected >= 0) {
          EXPECT_EQ(rows[static_cast<std::int64_t>(expected)], static_cast<double>(n));
        }
        taken += chosen ? 1 : 0;
      }
    }
    return std::vector<Buffer>{weights, rows, slots};
  });
}

TEST_P(Experts, BalanceAndSquareLoss) {
  // Two choices, two sequences of two rows. First: both choose 0; second: one each.
  const Buffer weights(dtype(), {0.7, 0.8, 0, 0.6, 0, 0, 0.9, 0});
  const Buffer affinity(dtype(), {0.7, 0.8, 0.1, 0.6, 0.3, 0.2, 0.9, 0.4});
  Buffer losses(dtype(), 2), gradient(dtype(), 8);
  backend()->balance_loss(losses.view(), gradient.view(), affinity.view(), weights.view(),
                          {.rows = 4, .seq = 2, .choices = 2}, 10.0);
  expect_close(losses, {2 * 1 * 0.75, 2 * (0.5 * 0.35 + 0.5 * 0.65)}, tolerance(), "losses");
  expect_close(gradient, {10, 10, 5, 5, 0, 0, 5, 5}, tolerance(), "gradient");
  const Buffer x(dtype(), {1, -2, 3, 0});
  Buffer squares(dtype(), 4), dx(dtype(), 4);
  backend()->square_loss(squares.view(), dx.view(), x.view(), 0.5);
  EXPECT_EQ(all_of(squares), (Values{1, 4, 9, 0}));
  EXPECT_EQ(all_of(dx), (Values{1, -2, 3, 0}));
}

// A batch of products is those products one after the other, to the bit.
TEST_P(Experts, BatchedProductsAreTheProducts) {
  for (const LinearShape& s : {LinearShape{40, 33, 17, 3}, LinearShape{2, 64, 9, 2}, LinearShape{1, 5, 4, 5},
                               LinearShape{0, 3, 4, 2}}) {
    const auto b = backend();
    const std::int64_t xs = s.rows * s.in, ys = s.rows * s.out, ws = s.in * s.out;
    const Buffer x = random(dtype(), s.batch * xs, 1), w = random(dtype(), s.batch * ws, 2),
                 dy = random(dtype(), s.batch * ys, 3);
    Buffer y(dtype(), s.batch * ys), dx(dtype(), s.batch * xs), dw(dtype(), s.batch * ws),
        sum(dtype(), s.batch * ws, 1);
    b->linear_forward(y.view(), x.view(), w.view(), s);
    b->linear_backward_input(dx.view(), dy.view(), w.view(), s);
    b->linear_backward_weight(dw.view(), dy.view(), x.view(), s);
    b->linear_backward_weight_accumulate(sum.view(), dy.view(), x.view(), s);
    LinearShape one = s;
    one.batch = 1;
    for (std::int64_t e = 0; e < s.batch; ++e) {
      const auto part = [&](const Buffer& of, std::int64_t size) {
        Buffer out(dtype(), size);
        for (std::int64_t i = 0; i < size; ++i) out.set(i, of[e * size + i]);
        return out;
      };
      Buffer y1(dtype(), ys), dx1(dtype(), xs), dw1(dtype(), ws), sum1(dtype(), ws, 1);
      const Buffer x1 = part(x, xs), w1 = part(w, ws), dy1 = part(dy, ys);
      b->linear_forward(y1.view(), x1.view(), w1.view(), one);
      b->linear_backward_input(dx1.view(), dy1.view(), w1.view(), one);
      b->linear_backward_weight(dw1.view(), dy1.view(), x1.view(), one);
      b->linear_backward_weight_accumulate(sum1.view(), dy1.view(), x1.view(), one);
      EXPECT_EQ(all_of(part(y, ys)), all_of(y1));
      EXPECT_EQ(all_of(part(dx, xs)), all_of(dx1));
      EXPECT_EQ(all_of(part(dw, ws)), all_of(dw1));
      EXPECT_EQ(all_of(part(sum, ws)), all_of(sum1));
    }
  }
}

TEST_P(Experts, ErrorsNameTheOp) {
  const auto b = backend();
  Buffer eight(dtype(), 8), twelve(dtype(), 12), rows(DType::I32, 6), slots(DType::I32, 12);
  const ExpertShape s = kShape;
  expect_error([&] { b->expert_affinity_forward(eight.view(), View{}, eight.view(), 8, 0); },
               "expert_affinity_forward", "choices");
  expect_error(
      [&] {
        b->expert_gather_forward(twelve.view(), eight.view(), integers({0, 1, 2, 3, 4, 0}).view(), s);
      },
      "expert_gather_forward", "a row");
  expect_error(
      [&] {
        b->expert_slots(rows.view(), slots.view(), integers({0, 1, 2, 3, 8, 9}).view(), s);
      },
      "expert_slots", "an index");
  expect_error(
      [&] {
        const Buffer beyond = integers({6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0});
        b->expert_gather_backward(eight.view(), twelve.view(), beyond.view(), s);
      },
      "expert_gather_backward", "a slot");
  expect_error(
      [&] { b->expert_combine_forward(twelve.view(), twelve.view(), twelve.view(), slots.view(), s); },
      "expert_combine_forward", "y");
  expect_error([&] { b->token_choice_forward(twelve.view(), twelve.view(), 4, 3, 4); },
               "token_choice_forward", "top_k");
  expect_error([&] { b->expert_fill(rows.view(), slots.view(), twelve.view(), 3, s); }, "expert_fill",
               "rows");
  expect_error([&] { b->expert_statistics(eight.view(), eight.view(), ConstView{}, slots.view(), 2, s); },
               "expert_statistics", "choices");
}

}  // namespace
}  // namespace fathom::kernel_test
