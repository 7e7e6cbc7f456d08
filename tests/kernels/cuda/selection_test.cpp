// Selection and int32 kernels on the GPU: exactly what the CPU chooses.
#include <algorithm>
#include <limits>

#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

using Values = std::vector<double>;

class CudaSelection : public CudaKernels {};

Buffer scores_with_ties(std::int64_t n, double coarse) {
  Buffer scores = random(DType::F32, n, 9);
  for (std::int64_t i = 0; i < n; ++i) scores.set(i, std::round(scores[i] * coarse) / coarse);
  return scores;
}

TEST_F(CudaSelection, TopKOfSpecialScores) {
  const double nan = std::nan(""), inf = INFINITY;
  const std::vector<Values> special = {
      Values(10, 0.5),
      {1, 2, 2, 2, 1, 3, 3, 2, 0, 2},
      {0.0, -0.0, 0.0, -0.0, -1, 1, -0.0, 0.0, -0.0, 0.0},  // the zeros are equal
      {nan, 1, nan, -inf, inf, nan, -1, 0, nan, -inf},      // NaN is the least, below -infinity
      {-nan, 1, nan, -inf, inf, -nan, -1, 0, nan, -inf},
      Values(10, nan),
      {-5, -4, -3, -2, -1, 1e-30, -1e-30, 5e-39, 2, 1e30},
  };
  for (const Values& scores : special) {
    for (std::int64_t keep = 0; keep <= 10; ++keep) {
      SCOPED_TRACE(keep);
      expect_as_on_the_cpu(
          {{DType::F32, scores}, {DType::I32, keep}},
          [&](Backend& b, const std::vector<View>& v) { b.top_k_rows(v[1], v[0], 1, 10, keep); }, 0);
    }
  }
}

TEST_F(CudaSelection, TopKOfManyLengths) {
  for (const std::int64_t seq : {1, 2, 31, 33, 64, 255, 256, 257, 1000, 1024, 2048, 2049, 4096}) {
    for (const double coarse : {1e9, 4.0}) {  // the second makes many ties
      constexpr std::int64_t kBatch = 5;
      const Buffer scores = scores_with_ties(kBatch * seq, coarse);
      for (const std::int64_t keep : {std::int64_t{1}, (seq + 7) / 8, seq - seq / 8, seq}) {
        SCOPED_TRACE(std::to_string(keep) + " of " + std::to_string(seq));
        expect_as_on_the_cpu(
            {scores, {DType::I32, kBatch * keep}},
            [&](Backend& b, const std::vector<View>& v) { b.top_k_rows(v[1], v[0], kBatch, seq, keep); }, 0);
      }
    }
  }
}

TEST_F(CudaSelection, SelectAbove) {
  for (const auto& [batch, seq] : {RowsWidth{1, 1}, {3, 4}, {2, 257}, {5, 1000}, {3, 4096}}) {
    Buffer scores = scores_with_ties(batch * seq, 4.0);
    if (seq > 2) scores.set(2, std::nan(""));
    for (const double threshold : {-100.0, -0.5, 0.0, 0.25, 0.3, 100.0}) {
      SCOPED_TRACE(std::to_string(batch) + " x " + std::to_string(seq) + ", " + std::to_string(threshold));
      // Beyond the rows that are found, what `indices` holds is undefined: only the part counts that is in
      // use.
      std::vector<Buffer> found;
      std::vector<std::int64_t> counts;
      for (Backend* backend : {&cpu(), &cuda()}) {
        const std::vector<Buffer> after =
            run_on(*backend, {scores, {DType::I32, batch * seq}, {DType::I32, batch + 1}},
                   [&, b = batch, t = seq](Backend& on, const std::vector<View>& v) {
                     counts.push_back(on.select_above(v[1], v[2], v[0], threshold, b, t));
                   });
        Values used;
        for (std::int64_t i = 0; i < counts.back(); ++i) used.push_back(after[1][i]);
        for (std::int64_t i = 0; i <= batch; ++i) used.push_back(after[2][i]);
        found.emplace_back(DType::I32, used);
      }
      EXPECT_EQ(counts[0], counts[1]);
      EXPECT_EQ(found[0].bytes(), found[1].bytes());
    }
  }
}

TEST_F(CudaSelection, GatherInt32) {
  for (const std::int64_t rows : {0, 1, 5, 1000, 40001}) {
    Buffer in(DType::I32, 2 * rows + 1);
    for (std::int64_t i = 0; i < in.size(); ++i) in.set(i, static_cast<double>(7 * i - 100));
    expect_as_on_the_cpu(
        {in, some_rows(2 * rows + 1, rows), {DType::I32, rows}},
        [](Backend& b, const std::vector<View>& v) { b.gather_int32(v[2], v[0], v[1]); }, 0);
  }
}

TEST_F(CudaSelection, FirstKeys) {
  for (const auto& [batch, seq] : {RowsWidth{1, 1}, {2, 5}, {3, 257}, {2, 1000}, {1, 4096}}) {
    for (const std::int64_t longest : {1, 7, 300, 5000}) {
      Buffer documents(DType::I32, batch * seq);
      for (std::int64_t i = 0; i < batch * seq; ++i) {
        documents.set(i, static_cast<double>(i / seq * 10000 + i % seq / longest));
      }
      expect_as_on_the_cpu(
          {documents, {DType::I32, batch * seq}},
          [b = batch, t = seq](Backend& on, const std::vector<View>& v) { on.first_keys(v[1], v[0], b, t); },
          0);
    }
  }
}

TEST_F(CudaSelection, RoutingStatistics) {
  for (const std::int64_t rows : {1, 8, 1000, 65536}) {
    const std::int64_t kept = (rows + 7) / 8;
    const Op of_p = [&](Backend& b, const std::vector<View>& v) {
      b.routing_statistics(v[3], v[0], v[1], v[2], 0.25, rows);
    };
    const Op of_r = [&](Backend& b, const std::vector<View>& v) {
      b.routing_statistics(v[3], v[0], v[0], v[2], 0.25, rows);
    };
    Buffer r = random(DType::F32, rows, 1);
    for (std::int64_t i = 0; i < rows; ++i) r.set(i, r[i] + 1);  // a mean of zero has no relative error
    // A sum of 65536 in fp32, in pieces.
    const std::vector<Buffer> buffers = {
        r, random(DType::F32, rows, 2), some_rows(rows, kept), {DType::F32, 8}};
    expect_as_on_the_cpu(buffers, of_p, 1e-5);
    expect_as_on_the_cpu(buffers, of_r, 1e-5);
  }
}

TEST_F(CudaSelection, NoRowsAtAll) {
  const GatherShape none{10, 0, 16};
  expect_as_on_the_cpu(
      {random(DType::F32, 160, 1), {DType::I32, std::int64_t{0}}, {DType::F32, std::int64_t{0}}},
      [&](Backend& b, const std::vector<View>& v) { b.gather_rows_forward(v[2], v[0], v[1], none); }, 0);
  expect_as_on_the_cpu(
      {random(DType::F32, 160, 1),
       {DType::I32, std::int64_t{0}},
       {DType::F32, std::int64_t{0}},
       random(DType::F32, 10, 2)},
      [&](Backend& b, const std::vector<View>& v) {
        b.gated_scatter_forward(v[0], v[0], v[2], v[3], v[1], GateKind::Sigmoid, none);
      },
      0);
}

}  // namespace
}  // namespace fathom::kernel_test
