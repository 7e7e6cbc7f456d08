#include <algorithm>
#include <numeric>

#include "kernel_suite.h"

namespace fathom::kernel_test {
namespace {

using Values = std::vector<double>;

class Routing : public KernelSuite {};
INSTANTIATE_TEST_SUITE_P(Cpu, Routing, ::testing::ValuesIn(cases()), name_of_case);

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

Values top_k_reference(const Buffer& scores, std::int64_t batch, std::int64_t seq, std::int64_t keep) {
  Values kept;
  for (std::int64_t b = 0; b < batch; ++b) {
    std::vector<std::int64_t> order(at(seq));
    std::iota(order.begin(), order.end(), b * seq);
    const auto score = [&](std::int64_t i) { return scores[i]; };
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t i, std::int64_t j) {
      if (std::isnan(score(i)) || std::isnan(score(j))) return !std::isnan(score(i)) && std::isnan(score(j));
      return score(i) > score(j);
    });
    std::sort(order.begin(), order.begin() + keep);
    kept.insert(kept.end(), order.begin(), order.begin() + keep);
  }
  return kept;
}

TEST_P(Routing, TopK) {
  const double nan = std::nan(""), inf = INFINITY;
  const std::vector<Values> special = {
      Values(10, 0.5),                                      // all equal: the first ones
      {1, 2, 2, 2, 1, 3, 3, 2, 0, 2},                       // blocks of equal scores
      {0.0, -0.0, 0.0, -0.0, -1, 1, -0.0, 0.0, -0.0, 0.0},  // the zeros are equal
      {nan, 1, nan, -inf, inf, nan, -1, 0, nan, -inf},      // NaN is the least, below -infinity
      Values(10, nan),
      {-5, -4, -3, -2, -1, 1e-30, -1e-30, 5e-39, 2, 1e30},
  };
  for (const Values& v : special) {
    for (std::int64_t keep = 0; keep <= 10; ++keep) {
      Buffer indices(DType::I32, keep);
      const Buffer scores(dtype(), v);
      backend()->top_k_rows(indices.view(), scores.view(), 1, 10, keep);
      expect_close(indices, top_k_reference(scores, 1, 10, keep), 0, "indices");
    }
  }
  for (const std::int64_t seq : {1, 3, 17, 64, 1000}) {
    for (const double coarse : {1e9, 4.0}) {  // the second makes many ties
      on_threads([&](Backend& b) {
        const std::int64_t batch = 5, keep = std::max<std::int64_t>(1, seq / 8);
        Buffer scores = random(dtype(), batch * seq, 9), indices(DType::I32, batch * keep);
        for (std::int64_t i = 0; i < batch * seq; ++i) {
          scores.set(i, std::round(scores[i] * coarse) / coarse);
        }
        b.top_k_rows(indices.view(), scores.view(), batch, seq, keep);
        expect_close(indices, top_k_reference(scores, batch, seq, keep), 0, "indices");
        return std::vector<Buffer>{indices};
      });
    }
  }
}

TEST_P(Routing, SelectAbove) {
  const Buffer scores(dtype(), {0.5, 0.7, -1, 0.5, std::nan(""), 0.6, -1, -2, 0.1, 9, 8, 0.5});
  Buffer indices(DType::I32, 12), offsets(DType::I32, 4);
  EXPECT_EQ(backend()->select_above(indices.view(), offsets.view(), scores.view(), 0.5, 3, 4), 4);
  expect_close(offsets, {0, 1, 2, 4}, 0, "offsets");
  EXPECT_EQ(indices[0], 1);
  EXPECT_EQ(indices[1], 5);
  EXPECT_EQ(indices[2], 9);
  EXPECT_EQ(indices[3], 10);
}

TEST_P(Routing, GatherRows) {
  for (const auto& [rows, width] : shapes()) {
    on_threads([&, rows = rows, width = width](Backend& b) {
      const GatherShape s{2 * rows, rows, width};
      const Buffer x = random(dtype(), 2 * rows * width, 1), dout = random(dtype(), rows * width, 2);
      const Buffer indices = some_rows(2 * rows, rows);
      Buffer positions(DType::I32, 2 * rows), picked(DType::I32, rows);
      for (std::int64_t i = 0; i < 2 * rows; ++i) positions.set(i, static_cast<double>(7 * i));
      Buffer out(dtype(), rows * width), dx(dtype(), 2 * rows * width, 1.0);
      b.gather_rows_forward(out.view(), x.view(), indices.view(), s);
      b.gather_rows_backward_accumulate(dx.view(), dout.view(), indices.view(), s);
      b.gather_int32(picked.view(), positions.view(), indices.view());
      Values ro(at(rows * width)), rdx(at(2 * rows * width), 1.0), rp;
      for (std::int64_t i = 0; i < rows * width; ++i) {
        const std::int64_t cell = static_cast<std::int64_t>(indices[i / width]) * width + i % width;
        ro[at(i)] = x[cell];
        rdx[at(cell)] += dout[i];
      }
      for (std::int64_t i = 0; i < rows; ++i) rp.push_back(7 * indices[i]);
      expect_close(out, ro, 0, "out");
      expect_close(dx, rdx, tolerance(1), "dx");
      expect_close(picked, rp, 0, "gather_int32");
      return std::vector<Buffer>{out, dx};
    });
  }
}

TEST_P(Routing, GatedScatter) {
  for (const GateKind gate : {GateKind::Raw, GateKind::Sigmoid, GateKind::Tanh}) {
    for (const auto& [rows, width] : shapes()) {
      on_threads([&, rows = rows, width = width](Backend& b) {
        const GatherShape s{3 * rows, rows, width};
        const std::int64_t n = 3 * rows * width;
        const Buffer x = random(dtype(), n, 1), f = random(dtype(), rows * width, 2),
                     dy = random(dtype(), n, 3);
        const Buffer r = random(dtype(), 3 * rows, 4), indices = some_rows(3 * rows, rows);
        Buffer y(dtype(), n), in_place = x, df(dtype(), rows * width), dr(dtype(), 3 * rows, 1.0);
        b.gated_scatter_forward(y.view(), x.view(), f.view(), r.view(), indices.view(), gate, s);
        b.gated_scatter_forward(in_place.view(), in_place.view(), f.view(), r.view(), indices.view(), gate,
                                s);
        b.gated_scatter_backward(df.view(), dr.view(), dy.view(), f.view(), r.view(), indices.view(), gate,
                                 s);
        EXPECT_EQ(in_place.bytes(), y.bytes());
        Values ry(at(n)), rdf(at(rows * width)), rdr(at(3 * rows), 1.0);
        for (std::int64_t i = 0; i < n; ++i) ry[at(i)] = x[i];
        for (std::int64_t i = 0; i < rows; ++i) {
          const auto row = static_cast<std::int64_t>(indices[i]);
          const double p = sigmoid(r[row]), t = std::tanh(r[row]);
          const double g = gate == GateKind::Raw ? r[row] : gate == GateKind::Sigmoid ? p : t;
          const double slope = gate == GateKind::Raw       ? 1
                               : gate == GateKind::Sigmoid ? p * (1 - p)
                                                           : 1 - t * t;
          for (std::int64_t j = 0; j < width; ++j) {
            ry[at(row * width + j)] += g * f[i * width + j];
            rdf[at(i * width + j)] = g * dy[row * width + j];
            rdr[at(row)] += slope * dy[row * width + j] * f[i * width + j];
          }
        }
        expect_close(y, ry, tolerance(4), "y");
        expect_close(df, rdf, tolerance(4), "df");
        expect_close(dr, rdr, tolerance(64), "dr");
        return std::vector<Buffer>{y, df, dr};
      });
    }
  }
}

TEST_P(Routing, MembershipBce) {
  for (const std::int64_t rows : {1, 5, 130, 40001}) {
    on_threads([&](Backend& b) {
      const std::int64_t kept = (rows + 2) / 3;
      Buffer r = random(dtype(), rows, 1, 4.0), losses(dtype(), rows), dr(dtype(), rows);
      r.set(0, 60);
      if (rows > 4) r.set(3, -60);
      const Buffer indices = some_rows(rows, kept);
      b.membership_bce(losses.view(), dr.view(), r.view(), indices.view(), rows, 0.5);
      Values target(at(rows), 0.0);
      for (std::int64_t k = 0; k < kept; ++k) target[at(static_cast<std::int64_t>(indices[k]))] = 1;
      for (std::int64_t i = 0; i < rows; ++i) {
        const double loss =
            std::max(r[i], 0.0) - r[i] * target[at(i)] + std::log1p(std::exp(-std::fabs(r[i])));
        const double slope = target[at(i)] > 0 ? -sigmoid(-r[i]) : sigmoid(r[i]);
        const double tiny = is_double() ? 1e-15 : 1e-37;
        EXPECT_NEAR(losses[i], loss, tolerance(8) * loss + tiny) << "r = " << r[i];
        EXPECT_NEAR(dr[i], 0.5 * slope, tolerance(8) * std::fabs(slope) + tiny) << "r = " << r[i];
      }
      Buffer again(dtype(), rows);
      b.membership_bce(again.view(), View{}, r.view(), indices.view(), rows, 0.5);
      EXPECT_EQ(again.bytes(), losses.bytes());
      return std::vector<Buffer>{losses, dr};
    });
  }
}

TEST_P(Routing, Statistics) {
  const Buffer r(dtype(), {1, -2, 3, 0.5, -0.5, 0, 0, 2}), p(dtype(), {1, 1, -1, -1, 1, 0, -1, 2});
  const Buffer indices = integers({0, 2, 7});
  Buffer out(dtype(), 8, 9.0);
  backend()->routing_statistics(out.view(), r.view(), p.view(), indices.view(), 0.0, 8);
  expect_close(out, {0.5, -2, 3, 0.5, 0.25, 0.5, 0.375, 0}, tolerance(1), "statistics");
  backend()->routing_statistics(out.view(), r.view(), r.view(), indices.view(), 0.5, 8);
  expect_close(out, {0.5, -2, 3, 0.375, 0.375, 0.375, 0.375, 0}, tolerance(1), "statistics of r itself");
}

TEST_P(Routing, Refusals) {
  const auto b = backend();
  Buffer x(dtype(), 8), indices(DType::I32, 2), bad = integers({0, 4}), r(dtype(), 4), offsets(DType::I32, 2);
  const GatherShape s{4, 2, 2};
  Buffer f(dtype(), 4);
  expect_error([&] { b->top_k_rows(indices.view(), r.view(), 1, 4, 5); }, "top_k_rows", "keep");
  expect_error([&] { b->top_k_rows(indices.view(), x.view(), 1, 4, 2); }, "top_k_rows", "scores: got 8");
  expect_error([&] { b->select_above(indices.view(), offsets.view(), r.view(), 0, 1, 4); }, "select_above",
               "indices");
  expect_error([&] { b->gather_rows_forward(f.view(), x.view(), bad.view(), s); }, "gather_rows",
               "index: got 4, expected 3");
  expect_error([&] { b->gather_int32(indices.view(), offsets.view(), bad.view()); }, "gather_int32", "index");
  expect_error(
      [&] {
        b->gated_scatter_forward(x.view(), x.view(), x.view(), r.view(), indices.view(), GateKind::Raw, s);
      },
      "gated_scatter", "f: got 8");
  expect_error([&] { b->membership_bce(r.view(), View{}, r.view(), bad.view(), 4, 1); }, "membership_bce",
               "index");
  expect_error([&] { b->routing_statistics(r.view(), r.view(), r.view(), indices.view(), 0, 4); },
               "routing_statistics", "out: got 4, expected 8");
}

}  // namespace
}  // namespace fathom::kernel_test
