// 200 optimizer steps beside PyTorch's AdamW, on the same parameters and batches (README.md of this folder).
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/golden/golden_model.h"
#include "train/optimizer.h"

namespace fathom::golden {
namespace {

constexpr std::int64_t kCurveBatch = 4;
constexpr std::int64_t kCurveSeq = 16;

struct LossCurve {
  std::vector<double> losses;      // cross-entropy before each update
  std::vector<double> objectives;  // with the routers' losses
};

// Training windows of one token more than a sequence: tokens are all but the last, targets all but the first.
Batch window_batch(Context& c, const std::vector<std::int32_t>& windows, std::size_t step) {
  std::vector<std::int32_t> tokens, targets;
  const std::size_t window = kCurveSeq + 1;
  for (std::size_t b = 0; b < kCurveBatch; ++b) {
    const auto begin = windows.begin() + static_cast<std::ptrdiff_t>((step * kCurveBatch + b) * window);
    tokens.insert(tokens.end(), begin, begin + kCurveSeq);
    targets.insert(targets.end(), begin + 1, begin + kCurveSeq + 1);
  }
  return make_batch(c, kCurveBatch, kCurveSeq, tokens, targets);
}

LossCurve train(const GoldenFile& file, DType dtype) {
  const GoldenFile shared("shared.h5");
  const std::vector<std::int32_t> windows = shared.ints("curve/tokens");
  const std::vector<double> rates = shared.doubles("curve/learning_rate");
  Context c(make_cpu_backend({}), dtype);
  Transformer model(c, model_config(file, kCurveSeq), routing_config(file), true);
  load_parameters(c, model);
  AdamW optimizer(c, model.parameters(), TrainConfig{});  // its defaults are the reference's settings
  LossCurve run;
  for (std::size_t step = 0; step < rates.size(); ++step) {
    begin_gradients(c, model.parameters());
    Tape tape(c);
    c.set_tape(&tape);
    const Batch batch = window_batch(c, windows, step);
    const ForwardResult result = model.forward(c, batch, TopK{});
    const LossSums sums = model.objective(c, batch, result, 1.0);
    c.set_tape(nullptr);
    tape.backward();
    settle_gradients(c, model.parameters());
    const auto rows = static_cast<double>(sums.rows);
    run.losses.push_back(sums.cross_entropy / rows);
    run.objectives.push_back(
        (sums.cross_entropy + model.routing().causal.aux_weight * sums.aux + sums.predictor) / rows);
    optimizer.update(c, model.parameters(), AdamW::norms(c, model.parameters()), rates[step],
                     static_cast<std::int64_t>(step) + 1);
  }
  return run;
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    if (!(std::abs(a[i] - b[i]) < INFINITY)) return INFINITY;
    largest = std::max(largest, std::abs(a[i] - b[i]));
  }
  return largest;
}

class Curve : public ::testing::TestWithParam<const char*> {};

TEST_P(Curve, FollowsPyTorchFor200Steps) {
  const GoldenFile file(GetParam() + std::string(".h5"));
  for (const DType dtype : {DType::F32, DType::F64}) {
    const std::string name = name_of(dtype);
    const LossCurve run = train(file, dtype);
    ASSERT_EQ(run.losses.size(), 200U);
    EXPECT_LT(run.losses.back(), 0.6 * run.losses.front()) << "the model has to learn for this to mean much";
    const double loss = largest_difference(run.losses, file.doubles("loss/" + name));
    const double objective = largest_difference(run.objectives, file.doubles("objective/" + name));
    const double tolerance = dtype == DType::F64 ? 1e-6 : 1e-3;
    EXPECT_LE(loss, tolerance) << name;
    EXPECT_LE(objective, tolerance) << name;
    fmt::print("{}: largest difference of a loss {:.2e}, of an objective {:.2e}\n", name, loss, objective);
    RecordProperty("largest_difference_" + name, fmt::format("{:.2e}", loss));
  }
}

INSTANTIATE_TEST_SUITE_P(Models, Curve, ::testing::Values("curve_dense", "curve_mod"),
                         [](const auto& p) { return std::string(p.param); });

}  // namespace
}  // namespace fathom::golden
