#include "kernel_suite.h"

namespace fathom::kernel_test {
namespace {

using Values = std::vector<double>;

class NormRope : public KernelSuite {};
INSTANTIATE_TEST_SUITE_P(Cpu, NormRope, ::testing::ValuesIn(cases()), name_of_case);

std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }

Values values_of(const Buffer& b) {
  Values v;
  for (std::int64_t i = 0; i < b.size(); ++i) v.push_back(b[i]);
  return v;
}

struct NormReference {
  Values y, rstd, dx, dw;
};

NormReference norm_reference(const Values& x, const Buffer& w, const Buffer& dy, std::int64_t rows,
                             std::int64_t width, double eps) {
  NormReference r{Values(x.size()), Values(at(rows)), Values(x.size()), Values(at(width), 0.0)};
  for (std::int64_t i = 0; i < rows; ++i) {
    double squares = 0, product = 0;
    for (std::int64_t j = 0; j < width; ++j) squares += x[at(i * width + j)] * x[at(i * width + j)];
    const double s = 1 / std::sqrt(squares / static_cast<double>(width) + eps);
    r.rstd[at(i)] = s;
    for (std::int64_t j = 0; j < width; ++j) product += dy[i * width + j] * w[j] * x[at(i * width + j)];
    for (std::int64_t j = 0; j < width; ++j) {
      const double v = x[at(i * width + j)], d = dy[i * width + j];
      r.y[at(i * width + j)] = v * s * w[j];
      r.dx[at(i * width + j)] = s * w[j] * d - v * s * s * s * product / static_cast<double>(width);
      r.dw[at(j)] += d * v * s;
    }
  }
  return r;
}

TEST_P(NormRope, RmsNorm) {
  for (const auto& [rows, width] : shapes()) {
    on_threads([&, rows = rows, width = width](Backend& b) {
      const NormShape s{rows, width, 1e-5};
      const std::int64_t n = rows * width;
      const Buffer x = random(dtype(), n, 1), w = random(dtype(), width, 2), dy = random(dtype(), n, 3);
      Buffer y(dtype(), n), rstd(dtype(), rows), dx(dtype(), n), dw(dtype(), width, 1.0);
      b.rms_norm_forward(y.view(), rstd.view(), x.view(), w.view(), s);
      b.rms_norm_backward(dx.view(), dw.view(), dy.view(), x.view(), w.view(), rstd.view(), s);
      Values v(at(n));
      for (std::int64_t i = 0; i < n; ++i) v[at(i)] = x[i];
      NormReference r = norm_reference(v, w, dy, rows, width, 1e-5);
      for (double& d : r.dw) d += 1.0;
      expect_close(y, r.y, tolerance(), "y");
      expect_close(rstd, r.rstd, tolerance(), "rstd");
      expect_close(dx, r.dx, tolerance(64), "dx");
      expect_close(dw, r.dw, tolerance(64), "dw");
      return std::vector<Buffer>{y, rstd, dx, dw};
    });
  }
}

// Also for weights so near to zero that they count as a little more.
TEST_P(NormRope, RmsNormBackwardFromOutput) {
  for (const auto& [rows, width] : shapes()) {
    on_threads([&, rows = rows, width = width](Backend& b) {
      const NormShape s{rows, width, 1e-5};
      const std::int64_t n = rows * width;
      const Buffer x = random(dtype(), n, 1), dy = random(dtype(), n, 3), dh = random(dtype(), n, 4);
      Buffer w = random(dtype(), width, 2), counted = w;
      for (std::int64_t j = 0; j < width; j += 3) {
        w.set(j, j % 2 == 0 ? 0.0 : -1e-20);
        counted.set(j, j % 2 == 0 ? kLeastNormWeight : -kLeastNormWeight);
      }
      Buffer y(dtype(), n), rstd(dtype(), rows), dx(dtype(), n), dw(dtype(), width, 1.0);
      b.rms_norm_forward(y.view(), rstd.view(), x.view(), w.view(), s);
      b.rms_norm_backward_from_output(dx.view(), dw.view(), View{}, dy.view(), y.view(), w.view(),
                                      rstd.view(), s);
      NormReference r = norm_reference(values_of(x), counted, dy, rows, width, 1e-5);
      for (double& d : r.dw) d += 1.0;
      expect_close(dx, r.dx, tolerance(64), "dx");
      expect_close(dw, r.dw, tolerance(64), "dw");
      Buffer sum = dh, dw_again(dtype(), width, 1.0);
      b.rms_norm_backward_from_output(sum.view(), dw_again.view(), sum.view(), dy.view(), y.view(), w.view(),
                                      rstd.view(), s);
      for (std::int64_t i = 0; i < n; ++i) r.dx[at(i)] += dh[i];
      expect_close(sum, r.dx, tolerance(64), "dx and dh");
      EXPECT_EQ(dw.bytes(), dw_again.bytes());
      return std::vector<Buffer>{dx, dw, sum};
    });
  }
}

TEST_P(NormRope, AddRmsNormWithAliases) {
  for (const auto& [rows, width] : shapes()) {
    on_threads([&, rows = rows, width = width](Backend& b) {
      const NormShape s{rows, width, 1e-5};
      const std::int64_t n = rows * width;
      const Buffer x = random(dtype(), n, 1), a = random(dtype(), n, 2), w = random(dtype(), width, 3);
      const Buffer dy = random(dtype(), n, 4), dh = random(dtype(), n, 5);
      Buffer h(dtype(), n), y(dtype(), n), rstd(dtype(), rows), dx(dtype(), n), alone(dtype(), n);
      Buffer dw(dtype(), width), dw_alone(dtype(), width), in_x = x, in_a = a, y2(dtype(), n), in_dh = dh;
      b.add_rms_norm_forward(h.view(), y.view(), rstd.view(), x.view(), a.view(), w.view(), s);
      b.add_rms_norm_forward(in_x.view(), y2.view(), rstd.view(), in_x.view(), a.view(), w.view(), s);
      EXPECT_EQ(in_x.bytes(), h.bytes());
      EXPECT_EQ(y2.bytes(), y.bytes());
      b.add_rms_norm_forward(in_a.view(), y2.view(), rstd.view(), x.view(), in_a.view(), w.view(), s);
      EXPECT_EQ(in_a.bytes(), h.bytes());
      b.add_rms_norm_backward(dx.view(), dw.view(), dh.view(), dy.view(), h.view(), w.view(), rstd.view(), s);
      b.add_rms_norm_backward(alone.view(), dw_alone.view(), View{}, dy.view(), h.view(), w.view(),
                              rstd.view(), s);
      Buffer dw2(dtype(), width);
      b.add_rms_norm_backward(in_dh.view(), dw2.view(), in_dh.view(), dy.view(), h.view(), w.view(),
                              rstd.view(), s);
      EXPECT_EQ(in_dh.bytes(), dx.bytes());
      Values sum(at(n));
      for (std::int64_t i = 0; i < n; ++i) sum[at(i)] = h[i];
      for (std::int64_t i = 0; i < n; ++i) EXPECT_NEAR(h[i], x[i] + a[i], tolerance(1) * 8);
      NormReference r = norm_reference(sum, w, dy, rows, width, 1e-5);
      expect_close(y, r.y, tolerance(), "y");
      expect_close(alone, r.dx, tolerance(64), "dx without dh");
      for (std::int64_t i = 0; i < n; ++i) r.dx[at(i)] += dh[i];
      expect_close(dx, r.dx, tolerance(64), "dx");
      expect_close(dw, r.dw, tolerance(64), "dw");
      EXPECT_EQ(dw.bytes(), dw_alone.bytes());
      return std::vector<Buffer>{h, y, dx, dw};
    });
  }
}

struct RopeCase {
  QkvShape shape;
  bool normed;
};

std::vector<RopeCase> rope_cases() {
  std::vector<RopeCase> all;
  for (const std::int64_t rows : {1, 5, 130}) {
    for (const bool normed : {false, true}) {
      all.push_back({{rows, 2, 1, 2, 10000.0, 1e-5}, normed});
      all.push_back({{rows, 3, 1, 6, 500.0, 1e-5}, normed});
      all.push_back({{rows, 4, 2, 64, 10000.0, 1e-5}, normed});
      // Of its 16 pairs 5 turn as before, 8 slower, and 3 in between.
      all.push_back({{rows, 2, 1, 32, 500.0, 1e-5, {RopeScalingKind::Llama3, 8.0, 1.0, 4.0, 128}}, normed});
      all.push_back({{rows, 2, 1, 16, 500.0, 1e-5, {RopeScalingKind::Linear, 3.0}}, normed});
    }
  }
  return all;
}

// Wavelengths as the paper of Llama 3 has them.
double scaled(double inverse, const RopeScaling& s) {
  if (s.kind == RopeScalingKind::None) return inverse;
  if (s.kind == RopeScalingKind::Linear) return inverse / s.factor;
  const double length = static_cast<double>(s.original_max_seq_len), wavelength = 2 * M_PI / inverse;
  if (wavelength < length / s.high_freq_factor) return inverse;
  if (wavelength > length / s.low_freq_factor) return inverse / s.factor;
  const double smooth = (length / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor);
  return (1 - smooth) * inverse / s.factor + smooth * inverse;
}

Values rope_reference(const Values& qkv, const Buffer& positions, const Values& wq, const Values& wk,
                      const QkvShape& s, bool normed, bool fp32_angles) {
  Values out = qkv;
  const std::int64_t d = s.head_dim;
  for (std::int64_t i = 0; i < s.rows; ++i) {
    for (std::int64_t h = 0; h < s.heads + s.kv_heads; ++h) {
      double* head = out.data() + i * s.row_size() + h * d;
      if (normed) {
        double squares = 0;
        for (std::int64_t j = 0; j < d; ++j) squares += head[j] * head[j];
        const double rstd = 1 / std::sqrt(squares / static_cast<double>(d) + s.norm_eps);
        for (std::int64_t j = 0; j < d; ++j) head[j] *= rstd * (h < s.heads ? wq : wk)[at(j)];
      }
      for (std::int64_t j = 0; j < d / 2; ++j) {
        double angle = positions[i] *
                       scaled(std::pow(s.rope_theta, -2.0 * static_cast<double>(j) / static_cast<double>(d)),
                              s.rope_scaling);
        if (fp32_angles) {
          const auto exponent = static_cast<double>(static_cast<float>(-2 * j) / static_cast<float>(d));
          const auto inverse = static_cast<float>(scaled(std::pow(s.rope_theta, exponent), s.rope_scaling));
          angle = static_cast<double>(static_cast<float>(positions[i]) * inverse);
        }
        const double a = head[j], c = head[j + d / 2];
        head[j] = a * std::cos(angle) - c * std::sin(angle);
        head[j + d / 2] = c * std::cos(angle) + a * std::sin(angle);
      }
    }
  }
  return out;
}

TEST_P(NormRope, RopeAndQkNorm) {
  for (const auto& [s, normed] : rope_cases()) {
    on_threads([&, s = s, normed = normed](Backend& b) {
      const std::int64_t n = s.rows * s.row_size(), d = s.head_dim, turned = s.heads + s.kv_heads;
      const Buffer x = random(dtype(), n, 1), wq = random(dtype(), d, 2), wk = random(dtype(), d, 3);
      const Buffer dout = random(dtype(), n, 4);
      Buffer positions(DType::I32, s.rows);
      for (std::int64_t i = 0; i < s.rows; ++i) positions.set(i, static_cast<double>((i * 37) % 1000));
      Buffer out(dtype(), n), rstd(dtype(), s.rows * turned), dx(dtype(), n), dwq(dtype(), d),
          dwk(dtype(), d);
      const ConstView q = normed ? wq.view() : ConstView{}, k = normed ? wk.view() : ConstView{};
      b.rope_forward(out.view(), rstd.view(), x.view(), positions.view(), q, k, s);
      b.rope_backward(dx.view(), dwq.view(), dwk.view(), dout.view(), x.view(), rstd.view(), positions.view(),
                      q, k, s);
      const Values vq = values_of(wq), vk = values_of(wk);
      const bool fp32 = !is_double();
      expect_close(out, rope_reference(values_of(x), positions, vq, vk, s, normed, fp32), tolerance(), "out");
      if (!normed) {  // in place gives the same
        Buffer same = x, back = dout;
        b.rope_forward(same.view(), View{}, same.view(), positions.view(), q, k, s);
        b.rope_backward(back.view(), View{}, View{}, back.view(), x.view(), View{}, positions.view(), q, k,
                        s);
        EXPECT_EQ(same.bytes(), out.bytes());
        EXPECT_EQ(back.bytes(), dx.bytes());
      }
      if (is_double() && s.rows <= 5) {  // finite differences of <dout, out>
        const auto objective = [&](const Values& vx, const Values& a, const Values& c) {
          const Values y = rope_reference(vx, positions, a, c, s, normed, false);
          double sum = 0;
          for (std::size_t i = 0; i < y.size(); ++i) sum += y[i] * dout[static_cast<std::int64_t>(i)];
          return sum;
        };
        const auto slope = [&](Values v, std::int64_t i, const std::function<double(const Values&)>& f) {
          const double step = 1e-5, middle = v[at(i)];
          v[at(i)] = middle + step;
          const double up = f(v);
          v[at(i)] = middle - step;
          return (up - f(v)) / (2 * step);
        };
        const Values vx = values_of(x);
        for (std::int64_t i = 0; i < n; i += 7) {
          EXPECT_NEAR(dx[i], slope(vx, i, [&](const Values& v) { return objective(v, vq, vk); }), 2e-7);
        }
        for (std::int64_t i = 0; normed && i < d; ++i) {
          EXPECT_NEAR(dwq[i], slope(vq, i, [&](const Values& v) { return objective(vx, v, vk); }), 2e-7);
          EXPECT_NEAR(dwk[i], slope(vk, i, [&](const Values& v) { return objective(vx, vq, v); }), 2e-7);
        }
      }
      return std::vector<Buffer>{out, rstd, dx, dwq, dwk};
    });
  }
}

TEST_P(NormRope, RopeTablesGrowAndFollowTheta) {
  const auto b = backend();
  for (const double theta : {10000.0, 100.0, 10000.0}) {
    for (const double position : {3.0, 5000.0, 7.0}) {
      const QkvShape s{1, 1, 1, 8, theta, 1e-5};
      const Buffer x = random(dtype(), 24, 1), positions = integers({position});
      Buffer out(dtype(), 24);
      b->rope_forward(out.view(), View{}, x.view(), positions.view(), View{}, View{}, s);
      expect_close(out, rope_reference(values_of(x), positions, {}, {}, s, false, !is_double()), tolerance(),
                   "out");
    }
  }
}

TEST_P(NormRope, Refusals) {
  const auto b = backend();
  Buffer x(dtype(), 12), w(dtype(), 4), short_w(dtype(), 3), r(dtype(), 3), y(dtype(), 12);
  const NormShape s{3, 4, 1e-5};
  expect_error([&] { b->rms_norm_forward(y.view(), r.view(), x.view(), short_w.view(), s); }, "rms_norm",
               "w: got 3, expected 4");
  expect_error([&] { b->rms_norm_forward(y.view(), w.view(), x.view(), w.view(), s); }, "rms_norm", "rstd");
  expect_error(
      [&] { b->rms_norm_backward(y.view(), short_w.view(), x.view(), x.view(), w.view(), r.view(), s); },
      "rms_norm_backward", "dw");
  const Buffer position = integers({-1});
  const QkvShape q{1, 1, 1, 4, 1e4, 1e-5};
  expect_error([&] { b->rope_forward(y.view(), View{}, x.view(), position.view(), View{}, View{}, q); },
               "rope", "position");
  expect_error([&] { b->rope_forward(y.view(), View{}, x.view(), position.view(), w.view(), View{}, q); },
               "rope", "k_weight");
  const QkvShape odd{1, 1, 1, 3, 1e4, 1e-5};
  expect_error([&] { b->rope_forward(y.view(), View{}, x.view(), position.view(), View{}, View{}, odd); },
               "rope", "even");
}

}  // namespace
}  // namespace fathom::kernel_test
