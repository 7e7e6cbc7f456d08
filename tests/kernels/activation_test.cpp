#include "kernel_suite.h"

namespace fathom::kernel_test {
namespace {

using Values = std::vector<double>;

class Activation : public KernelSuite {};
INSTANTIATE_TEST_SUITE_P(Cpu, Activation, ::testing::ValuesIn(cases()), name_of_case);

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

double silu_slope(double z) { return sigmoid(z) * (1 + z * (1 - sigmoid(z))); }

TEST_P(Activation, Swiglu) {
  for (const auto& [rows, hidden] : shapes()) {
    on_threads([&, rows = rows, hidden = hidden](Backend& b) {
      const std::int64_t n = rows * hidden;
      const Buffer x = random(dtype(), 2 * n, 1, 3.0), dh = random(dtype(), n, 2);
      Buffer h(dtype(), n), dx(dtype(), 2 * n), gate_h(dtype(), 2 * n), over = x, again(dtype(), 2 * n);
      b.swiglu_forward(h.view(), x.view(), rows, hidden);
      b.swiglu_backward(dx.view(), dh.view(), x.view(), rows, hidden);
      b.swiglu_forward_beside_gate(gate_h.view(), x.view(), rows, hidden);
      b.swiglu_forward_beside_gate(over.view(), over.view(), rows, hidden);
      EXPECT_EQ(over.bytes(), gate_h.bytes());
      b.swiglu_backward_from_output(again.view(), dh.view(), gate_h.view(), rows, hidden);
      b.swiglu_backward_from_output(over.view(), dh.view(), over.view(), rows, hidden);
      EXPECT_EQ(over.bytes(), again.bytes());
      Values rh(at(n)), rdx(at(2 * n));
      for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t gate = i / hidden * 2 * hidden + i % hidden, up = gate + hidden;
        rh[at(i)] = x[gate] * sigmoid(x[gate]) * x[up];
        rdx[at(gate)] = dh[i] * x[up] * silu_slope(x[gate]);
        rdx[at(up)] = dh[i] * x[gate] * sigmoid(x[gate]);
        EXPECT_EQ(gate_h[gate], x[gate]);
        EXPECT_EQ(gate_h[up], h[i]);
      }
      expect_close(h, rh, tolerance(4), "h");
      expect_close(dx, rdx, tolerance(8), "dx");
      expect_close(again, rdx, tolerance(16), "dx from the output");
      return std::vector<Buffer>{h, dx, again};
    });
  }
}

TEST_P(Activation, SwigluAtTheEnds) {
  const Buffer x(dtype(), {-1e30, -200, 200, -0.0, std::nan(""), 1, 1, 1, 1, 1});
  Buffer h(dtype(), 5), dx(dtype(), 10);
  const Buffer dh(dtype(), 5, 1.0);
  backend()->swiglu_forward(h.view(), x.view(), 1, 5);
  backend()->swiglu_backward(dx.view(), dh.view(), x.view(), 1, 5);
  expect_close(h, {0, 0, 200, 0, std::nan("")}, tolerance(2), "h");
  expect_close(dx, {0, 0, 1, 0.5, std::nan(""), 0, 0, 200, 0, std::nan("")}, tolerance(2), "dx");
  // From a product of almost nothing `up` comes back all the same: the slope at a gate of zero is a half.
  Buffer gate_h(dtype(), 10);
  backend()->swiglu_forward_beside_gate(gate_h.view(), x.view(), 1, 5);
  expect_close(gate_h, {-1e30, -200, 200, 0, std::nan(""), 0, 0, 200, 0, std::nan("")}, tolerance(2), "h");
  backend()->swiglu_backward_from_output(dx.view(), dh.view(), gate_h.view(), 1, 5);
  expect_close(dx, {0, 0, 1, 0.5, std::nan(""), 0, 0, 200, 0, std::nan("")}, tolerance(2), "dx");
}

TEST_P(Activation, BiasSilu) {
  for (const auto& [rows, width] : shapes()) {
    on_threads([&, rows = rows, width = width](Backend& b) {
      const std::int64_t n = rows * width;
      const Buffer x = random(dtype(), n, 1, 2.0), bias = random(dtype(), width, 2),
                   dh = random(dtype(), n, 3);
      Buffer h(dtype(), n), dx(dtype(), n), dbias(dtype(), width, 2.0);
      b.bias_silu_forward(h.view(), x.view(), bias.view(), rows, width);
      b.bias_silu_backward(dx.view(), dbias.view(), dh.view(), x.view(), bias.view(), rows, width);
      Values rh(at(n)), rdx(at(n)), rdb(at(width), 2.0);
      for (std::int64_t i = 0; i < n; ++i) {
        const double z = x[i] + bias[i % width];
        rh[at(i)] = z * sigmoid(z);
        rdx[at(i)] = dh[i] * silu_slope(z);
        rdb[at(i % width)] += rdx[at(i)];
      }
      expect_close(h, rh, tolerance(4), "h");
      expect_close(dx, rdx, tolerance(8), "dx");
      expect_close(dbias, rdb, tolerance(64), "dbias");
      return std::vector<Buffer>{h, dx, dbias};
    });
  }
}

TEST_P(Activation, RowScore) {
  for (const auto& [rows, width] : shapes()) {
    on_threads([&, rows = rows, width = width](Backend& b) {
      const std::int64_t n = rows * width;
      const Buffer x = random(dtype(), n, 1), w = random(dtype(), width, 2), dr = random(dtype(), rows, 3);
      const Buffer bias(dtype(), 1, 0.25);
      Buffer r(dtype(), rows), plain(dtype(), rows), dx(dtype(), n, 1.0), dw(dtype(), width, 2.0);
      Buffer dbias(dtype(), 1, 3.0), dw_only(dtype(), width, 2.0);
      b.row_score_forward(r.view(), x.view(), w.view(), bias.view(), rows, width);
      b.row_score_forward(plain.view(), x.view(), w.view(), View{}, rows, width);
      b.row_score_backward_accumulate(dx.view(), dw.view(), dbias.view(), dr.view(), x.view(), w.view(), rows,
                                      width);
      b.row_score_backward_accumulate(View{}, dw_only.view(), View{}, dr.view(), x.view(), w.view(), rows,
                                      width);
      EXPECT_EQ(dw.bytes(), dw_only.bytes());
      Values rr(at(rows), 0.25), rp(at(rows), 0.0), rdx(at(n), 1.0), rdw(at(width), 2.0);
      double rdb = 3.0;
      for (std::int64_t i = 0; i < rows; ++i) {
        rdb += dr[i];
        for (std::int64_t j = 0; j < width; ++j) {
          rr[at(i)] += x[i * width + j] * w[j];
          rp[at(i)] += x[i * width + j] * w[j];
          rdx[at(i * width + j)] += dr[i] * w[j];
          rdw[at(j)] += dr[i] * x[i * width + j];
        }
      }
      expect_close(r, rr, tolerance(128), "r");
      expect_close(plain, rp, tolerance(128), "r without bias");
      expect_close(dx, rdx, tolerance(4), "dx");
      expect_close(dw, rdw, tolerance(64), "dw");
      expect_close(dbias, {rdb}, tolerance(128), "dbias");
      return std::vector<Buffer>{r, dx, dw, dbias};
    });
  }
}

TEST_P(Activation, ARowsResultDoesNotDependOnWhereItLies) {
  for (const std::int64_t width : {3, 17, 100, 257}) {
    const Buffer row = random(dtype(), width, 1), w = random(dtype(), width, 2);
    constexpr std::int64_t kRows = 40;
    Buffer x(dtype(), kRows * width), r(dtype(), kRows), y(dtype(), kRows * width), rstd(dtype(), kRows);
    for (std::int64_t i = 0; i < kRows * width; ++i) x.set(i, row[i % width]);
    const auto b = backend();
    b->row_score_forward(r.view(), x.view(), w.view(), View{}, kRows, width);
    b->rms_norm_forward(y.view(), rstd.view(), x.view(), w.view(), {kRows, width, 1e-5});
    for (std::int64_t i = 1; i < kRows; ++i) {
      EXPECT_EQ(r[i], r[0]) << "row " << i << " of width " << width;
      EXPECT_EQ(rstd[i], rstd[0]) << "row " << i << " of width " << width;
    }
    for (std::int64_t i = width; i < kRows * width; ++i) EXPECT_EQ(y[i], y[i % width]);
  }
}

TEST_P(Activation, Embedding) {
  constexpr std::int64_t kVocab = 11;
  for (const auto& [rows, width] : shapes()) {
    on_threads([&, rows = rows, width = width](Backend& b) {
      const Buffer table = random(dtype(), kVocab * width, 1), dout = random(dtype(), rows * width, 2);
      Buffer tokens(DType::I32, rows), out(dtype(), rows * width), dtable(dtype(), kVocab * width, 1.0);
      for (std::int64_t i = 0; i < rows; ++i) tokens.set(i, static_cast<double>(i * i % kVocab));
      b.embedding_forward(out.view(), table.view(), tokens.view(), rows, width);
      b.embedding_backward_accumulate(dtable.view(), dout.view(), tokens.view(), rows, width);
      Values ro(at(rows * width)), rt(at(kVocab * width), 1.0);
      for (std::int64_t i = 0; i < rows * width; ++i) {
        const std::int64_t cell = static_cast<std::int64_t>(tokens[i / width]) * width + i % width;
        ro[at(i)] = table[cell];
        rt[at(cell)] += dout[i];
      }
      expect_close(out, ro, 0, "out");
      expect_close(dtable, rt, tolerance(64), "dtable");
      return std::vector<Buffer>{out, dtable};
    });
  }
}

TEST_P(Activation, Refusals) {
  const auto b = backend();
  Buffer x(dtype(), 6), h(dtype(), 4), r(dtype(), 2), tokens = integers({0, 3}), index(DType::I32, 6);
  expect_error([&] { b->swiglu_forward(h.view(), x.view(), 2, 2); }, "swiglu_forward", "got 6, expected 8");
  expect_error([&] { b->swiglu_backward(x.view(), h.view(), x.view(), 2, 2); }, "swiglu_backward",
               "got 6, expected 8");
  expect_error([&] { b->bias_silu_forward(x.view(), x.view(), x.view(), 2, 3); }, "bias_silu", "bias");
  expect_error([&] { b->row_score_forward(r.view(), x.view(), x.view(), View{}, 2, 3); }, "row_score",
               "w: got 6");
  expect_error([&] { b->embedding_forward(h.view(), x.view(), tokens.view(), 2, 2); }, "embedding",
               "token: got 3, expected 2");
  expect_error([&] { b->embedding_backward_accumulate(x.view(), x.view(), tokens.view(), 2, 2); },
               "embedding", "token");
  expect_error([&] { b->swiglu_forward(index.view(), x.view(), 2, 2); }, "swiglu", "int32");
}

}  // namespace
}  // namespace fathom::kernel_test
