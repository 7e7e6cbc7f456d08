// Tokens that a GPU chooses from logits, against the same rule on the host in double.
#include <algorithm>
#include <cmath>
#include <random>

#include <fmt/format.h>
#include <gmock/gmock.h>

#include "tests/devices.h"
#include "tests/kernels/cuda/on_device.h"

namespace fathom::kernel_test {
namespace {

using testing_support::Device;

class CudaChoose : public ::testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    opened_ = testing_support::open_device(Device::Cuda, {});
    testing_support::skip_without(opened_);
  }
  std::vector<TokenPick> choose(const std::vector<double>& logits, std::vector<TokenPick> picks,
                                std::int64_t vocab, std::int64_t choices) {
    const DeviceBuffer device(*opened_.backend, Buffer(GetParam(), logits));
    EXPECT_TRUE(opened_.backend->choose_tokens(picks, device.view(), vocab, choices));
    return picks;
  }
  testing_support::OpenedDevice opened_;
};

/// As the device has it.
double rounded(DType dtype, double x) { return Buffer(dtype, std::vector<double>{x})[0]; }

TEST_P(CudaChoose, TheMostLikelyAndTheDrawn) {
  if (!opened_.backend) return;
  std::mt19937 random(3);
  std::normal_distribution<double> normal(0, 3);
  std::uniform_real_distribution<double> share(0, 1);
  for (const std::int64_t vocab : {1, 7, 512, 1003, 32768}) {
    const std::int64_t choices = vocab > 100 ? vocab - 5 : vocab, rows = 9;
    std::vector<double> logits;
    for (std::int64_t i = 0; i < rows * vocab; ++i) logits.push_back(rounded(GetParam(), normal(random)));
    std::vector<TokenPick> asked;
    for (std::int64_t r = 0; r < rows; ++r)
      asked.push_back(
          {r % 3 == 0 ? 0.0 : 0.4 * static_cast<double>(r), r == 1 ? 0.0 : share(random), 0, true, r != 3});
    const std::vector<TokenPick> got = choose(logits, asked, vocab, choices);
    for (std::int64_t r = 0; r < rows; ++r) {
      SCOPED_TRACE(fmt::format("vocabulary {} row {}", vocab, r));
      const TokenPick& pick = got[static_cast<std::size_t>(r)];
      EXPECT_TRUE(pick.finite);
      const auto from = logits.begin() + r * vocab;
      const auto most = std::max_element(from, from + choices);
      if (pick.temperature == 0) {
        EXPECT_EQ(pick.token, most - from);
        double sum = 0;
        for (std::int64_t id = 0; id < choices; ++id) sum += std::exp(from[id] - *most);
        EXPECT_NEAR(pick.share, pick.wants_share ? 1 / sum : 1, 1e-12);
        continue;
      }
      ASSERT_THAT(pick.token, ::testing::AllOf(::testing::Ge(0), ::testing::Lt(choices)));
      double total = 0, before = 0, own = 0;
      for (std::int64_t id = 0; id < choices; ++id) {
        const double w = std::exp((from[id] - *most) / pick.temperature);
        total += w;
        if (id < pick.token) before += w;
        if (id == pick.token) own = w;
      }
      EXPECT_GE(pick.uniform, before / total - 1e-12);
      EXPECT_LE(pick.uniform, (before + own) / total + 1e-12);
    }
  }
}

TEST_P(CudaChoose, TiesGoToTheLowerIdAndBrokenRowsSaySo) {
  if (!opened_.backend) return;
  constexpr std::int64_t kVocab = 1500;
  std::vector<double> logits(3 * kVocab, -1.0);
  logits[700] = logits[1200] = 2.0;
  logits[kVocab + 3] = NAN;
  logits[2 * kVocab + 1499] = INFINITY;  // behind the choices
  const std::vector<TokenPick> got = choose(logits, std::vector<TokenPick>(3), kVocab, kVocab - 1);
  EXPECT_EQ(got[0].token, 700);
  EXPECT_TRUE(got[0].finite);
  EXPECT_FALSE(got[1].finite);
  EXPECT_TRUE(got[2].finite);
  EXPECT_EQ(got[2].token, 0);
}

INSTANTIATE_TEST_SUITE_P(Types, CudaChoose, ::testing::Values(DType::F32, DType::BF16),
                         [](const auto& of) { return std::string(name_of(of.param)); });

}  // namespace
}  // namespace fathom::kernel_test
