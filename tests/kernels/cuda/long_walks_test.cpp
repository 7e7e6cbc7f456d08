// Backward kernels whose warps walk over rows that are asked for ahead: so many rows that every warp has
// several, and what is asked for goes around more than once.
#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

/// The same numbers in fp32, which the CPU computes in.
Buffer widened(const Buffer& b) {
  if (b.dtype() != DType::BF16) return b;
  Buffer wide(DType::F32, b.size());
  for (std::int64_t i = 0; i < b.size(); ++i) wide.set(i, b[i]);
  return wide;
}

class CudaLongWalks : public CudaKernels {
 protected:
  /// On both, on the GPU twice: elements to a tolerance of themselves and of the mean size of all.
  void expect_like_the_cpu(const std::vector<Buffer>& buffers, const Op& op) {
    std::vector<Buffer> wide;
    for (const Buffer& b : buffers) wide.push_back(widened(b));
    const std::vector<Buffer> exact = run_on(cpu(), wide, op);
    const std::vector<Buffer> ours = run_on(cuda(), buffers, op), again = run_on(cuda(), buffers, op);
    for (std::size_t k = 0; k < buffers.size(); ++k) {
      SCOPED_TRACE("buffer " + std::to_string(k));
      EXPECT_EQ(ours[k].bytes(), again[k].bytes());
      const double tolerance = buffers[k].dtype() == DType::BF16 ? 1e-2 : 3e-4;
      double mean = 0;
      for (std::int64_t i = 0; i < exact[k].size(); ++i) mean += std::fabs(exact[k][i]);
      mean /= static_cast<double>(exact[k].size());
      for (std::int64_t i = 0; i < exact[k].size(); ++i) {
        ASSERT_NEAR(ours[k][i], exact[k][i], tolerance * (std::fabs(exact[k][i]) + mean)) << "[" << i << "]";
      }
    }
  }
};

/// Norms of rows are about 1, and weights not far from it.
Buffer positive(std::int64_t n, unsigned seed) {
  Buffer b = random(DType::F32, n, seed);
  for (std::int64_t i = 0; i < n; ++i) b.set(i, 1.0 + 0.25 * std::tanh(b[i]));
  return b;
}

constexpr DType kCompute[] = {DType::F32, DType::BF16};

TEST_F(CudaLongWalks, NormBackward) {
  struct Case {
    std::int64_t rows, width;
  };
  for (const Case& c : {Case{9000, 64}, Case{6000, 768}, Case{1700, 2048}, Case{900, 4096}}) {
    for (const DType t : kCompute) {
      SCOPED_TRACE(testing::Message() << c.rows << " rows of " << c.width << ", " << name_of(t));
      const std::int64_t n = c.rows * c.width;
      const NormShape s{c.rows, c.width};
      const std::vector<Buffer> buffers = {
          {t, n},          {DType::F32, c.width}, random(t, n, 1),    random(t, n, 2),
          random(t, n, 3), positive(c.width, 4),  positive(c.rows, 5)};
      expect_like_the_cpu(buffers, [&](Backend& b, const std::vector<View>& v) {
        b.rms_norm_backward(v[0], v[1], v[3], v[4], v[5], v[6], s);
      });
      expect_like_the_cpu(buffers, [&](Backend& b, const std::vector<View>& v) {
        b.add_rms_norm_backward(v[0], v[1], v[2], v[3], v[4], v[5], v[6], s);
      });
      expect_like_the_cpu(buffers, [&](Backend& b, const std::vector<View>& v) {
        b.rms_norm_backward_from_output(v[0], v[1], v[2], v[3], v[4], v[5], v[6], s);
      });
    }
  }
}

TEST_F(CudaLongWalks, RopeBackwardWithQkNorm) {
  for (const QkvShape& s : {QkvShape{9000, 2, 1, 64}, QkvShape{1500, 12, 12, 64}, QkvShape{1500, 8, 2, 128},
                            QkvShape{9000, 1, 1, 16}, QkvShape{1500, 3, 1, 256}}) {
    for (const DType t : kCompute) {
      SCOPED_TRACE(testing::Message()
                   << s.rows << " rows of " << s.heads << " heads of " << s.head_dim << ", " << name_of(t));
      const std::int64_t n = s.rows * s.row_size(), turned = s.heads + s.kv_heads;
      Buffer positions(DType::I32, s.rows);
      for (std::int64_t i = 0; i < s.rows; ++i) positions.set(i, static_cast<double>(i % 2048));
      expect_like_the_cpu({{t, n},
                           {DType::F32, s.head_dim},
                           {DType::F32, s.head_dim},
                           random(t, n, 1),
                           random(t, n, 2),
                           positive(s.rows * turned, 3),
                           positions,
                           positive(s.head_dim, 4),
                           positive(s.head_dim, 5)},
                          [&](Backend& b, const std::vector<View>& v) {
                            b.rope_backward(v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], s);
                          });
    }
  }
}

}  // namespace
}  // namespace fathom::kernel_test
